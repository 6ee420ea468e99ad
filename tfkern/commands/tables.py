"""Tables of plain text that are readable at any width."""

import shutil
import sys
from collections.abc import Iterable, Sequence


def width() -> int:
    """The columns of the terminal that standard output goes to. sys.maxsize for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], named: int, columns: int) -> str:
    """A table of aligned columns, if it fits into `columns` characters. Otherwise each row is a paragraph: its first `named`
    cells, and below them its other cells with their headings, as many on a line as fit."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= columns:
        ruled = (headings, ["-" * w for w in widths], *rows)
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in ruled)
    label, lines = max(map(len, headings[named:])), []
    wide = label + 2 + max(widths[named:])
    beside = max(1, columns // (wide + 2))
    for row in rows:
        cells = [f"  {h:{label}}  {cell}".ljust(wide + 2) for h, cell in zip(headings[named:], row[named:], strict=True)]
        lines += [" ".join(row[:named]), *("".join(cells[i : i + beside]).rstrip() for i in range(0, len(cells), beside))]
    return "\n".join(lines)
