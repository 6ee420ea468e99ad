"""Checks of arguments. A bad argument ends the command with one line before anything is computed."""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from tfkern.ending import InputError


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type that accepts a finite number from `least` to `most`. kind: int or float."""
    bounds = f"{least} or more" if most == math.inf else f"from {least} to {most}"

    def parsed(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and value != math.inf):
            raise argparse.ArgumentTypeError(f"must be {'a whole' if kind is int else 'a'} number, {bounds}, but is {text!r}")
        return value

    return parsed


SEED = number(int, 0, 2**63 - 1)


def writable(folder: Path, option: str = "--out") -> None:
    """Make a folder for results if it does not exist, and check that files can be made in it. Raise InputError if not.
    option: the flag that the message names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{option} must be a folder that can be written to, or one that can be made, but {folder}: {error.strerror}"
        ) from None
