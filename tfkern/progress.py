"""The progress of a long command, on standard error, so that its standard output can be kept. Imports nothing of tfkern."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PAUSE = 5.0  # seconds between lines where they are not overwritten


class Progress:
    """One line that changes in place on a terminal; elsewhere, such as in a log, a line every PAUSE seconds."""

    def __init__(self):
        self.there, self.shown, self.last = sys.stderr.isatty(), False, time.monotonic()

    def show(self, text: str) -> None:
        """Show the progress. The next output on the same terminal overwrites it."""
        if self.there:
            text = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)
            self.shown = True
        elif time.monotonic() - self.last >= PAUSE:
            print(text, file=sys.stderr, flush=True)
            self.last = time.monotonic()

    def clear(self) -> None:
        """Remove the line, before other output."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = False


def counted(items: Iterable[T], describe: Callable[[T], object]) -> Iterator[T]:
    """Yield the items. While the caller works on one, the progress shows "3 of 20" and its description."""
    items, progress = list(items), Progress()
    try:
        for number, item in enumerate(items, 1):
            progress.show(f"{number} of {len(items)}: {describe(item)}")
            yield item
            progress.clear()
    finally:
        progress.clear()
