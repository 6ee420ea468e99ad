"""Tables of plain text that can be read at any width."""

import shutil
import sys
from collections.abc import Iterable, Sequence


def width() -> int:
    """Columns of the terminal that standard output goes to; a file or a pipe has any number."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], named: int, columns: int) -> str:
    """Aligned columns where `columns` are enough; else a block of lines for each row, led by its first `named` cells."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= columns:
        ruled = (headings, ["-" * w for w in widths], *rows)
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in ruled)
    label = max(map(len, headings[named:]))
    blocks = (
        [" ".join(row[:named]), *(f"  {h.ljust(label)}  {cell}" for h, cell in zip(headings[named:], row[named:], strict=True))]
        for row in rows
    )
    return "\n".join("\n".join(block) for block in blocks)
