"""How a command ends: its exit status, and one line in the place of a traceback that would not help the user.

Imports nothing of tfkern: the programs of bench/static, which need no torch, end so, too.
"""

import contextlib
import os
import sys
from collections.abc import Callable

INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell shows an end by SIGINT and by SIGPIPE


class InputError(Exception):
    """An unusable argument or file. The message names it, and says what is wanted and what to do."""


def ended(name: str, command: Callable[[], int], refused: tuple[type[Exception], ...] = ()) -> int:
    """Run a command and return its exit status: its own; 2 for bad input, which is InputError and `refused`; 1 where the system
    refuses (a full disk); 130 when interrupted; 141, in silence, when nobody reads its output any more."""
    _streams_are_there()
    try:
        try:
            status = command()
        except SystemExit as stop:  # argparse's
            status = stop.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
        if sys.stderr.isatty():
            print(file=sys.stderr)  # to a new line, after ^C and the progress line
    except BrokenPipeError:
        status = PIPE_CLOSED
    except OSError as error:
        status = _told(name, f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error, 1)
    except (InputError, *refused) as error:
        status = _told(name, error, 2)
    _drop_what_nobody_takes()
    return status


def _told(name: str, what: object, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"{name}: {what}", file=sys.stderr)
    return status


def _streams_are_there() -> None:
    """Replace a stream that the caller has closed by the null device, and escape characters that a terminal can't show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_what_nobody_takes() -> None:
    """Send output that can't be written to the null device: Python would report an error when it flushes at its exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
