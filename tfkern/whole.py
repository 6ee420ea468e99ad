"""Files that are written whole or not at all. Imports nothing of tfkern."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a file beside `path`, and then put it there.

    An end at any moment, of the process or of the machine, leaves the file as it was, or the new one whole. An error leaves
    the file as it was, and nothing beside it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_names(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_names(folder: Path) -> None:
    """Have the names in a folder on the disk before what comes next."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
