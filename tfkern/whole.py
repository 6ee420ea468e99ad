"""Files that are written whole or not at all. Imports nothing of tfkern."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, and then rename it to `path`.

    If the process or the machine ends at any moment, either the old file or the whole new one is there. After an error the old
    file is there, and no temporary one.
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
    """Flush the names of a folder to the disk before returning."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
