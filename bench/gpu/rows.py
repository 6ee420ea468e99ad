"""The rows of a run: one JSON object a line, appended as they come, by one process.

A row has `step`, the `case` that it is about, and figures, or why there are none (`skipped`), or what is wrong (`problem`).
A try of a case writes a row with the time at which it `began`, rows of figures, and a row with the time at which it `ended`. If
a case was tried several times, the last try counts.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

MARKS = ("began", "ended")


class RowsError(Exception):
    """Rows cannot be written any more. The message says where and why."""


@dataclass
class Try:
    """The rows that a try of a case has written, and whether it ran to its end."""

    rows: list[dict] = field(default_factory=list)
    ended: bool = False

    @property
    def done(self) -> bool:
        """Whether the try ran to its end without a problem."""
        return self.ended and not any(row.get("problem") for row in self.rows)


def read(path: Path) -> tuple[list[dict], int]:
    """The rows of a file, and the number of its lines that are not a whole row. A file that is not there has no rows."""
    rows, torn = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            torn += 1
    return rows, torn


def tries(rows: list[dict]) -> dict[tuple[str, str], Try]:
    """{(step, case): its last try}, in the order in which the last tries began."""
    found: dict[tuple[str, str], Try] = {}
    for row in rows:
        key = row["step"], row.get("case")
        if "began" in row:
            found.pop(key, None)
        last = found.setdefault(key, Try())
        if "ended" in row:
            last.ended = True
        elif "began" not in row:
            last.rows.append(row)
    return found


def current(rows: list[dict]) -> list[dict]:
    """The rows of each case's last try, without the marks of where it began and ended."""
    return [row for last in tries(rows).values() for row in last.rows]


def problems(rows: list[dict]) -> list[str]:
    """The problems of the current rows, one line each."""
    wrong = (row for row in current(rows) if row.get("problem"))
    return [f"{row['step']} {row.get('case')}: {first_line(row['problem'])}" for row in wrong]


def first_line(text: str) -> str:
    """The first line of a text, cut to 300 characters."""
    return text.strip().splitlines()[0][:300]


class RowFile:
    """A file of rows to append to. Lines that an earlier run left incomplete are removed, and counted in `torn`."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.torn = read(path)
        if self.torn:
            whole = path.with_suffix(".whole")
            whole.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            whole.replace(path)
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    def append(self, row: dict) -> None:
        """Write a row. If that fails, leave the file as it was and raise RowsError."""
        line = (json.dumps(row, default=str) + "\n").encode()
        try:
            if (written := self._file.write(line)) < len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)
            raise RowsError(f"rows can't be written to {self.path}: {error}") from error
        self._size += len(line)
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()
