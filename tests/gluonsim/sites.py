"""Where in the kernel source the simulator was called from."""

import linecache
import os
import re
import sys
from collections.abc import Iterator
from types import FrameType

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_ASSIGNMENT = re.compile(r"\s*(\w+)\s*(?::[^=]+)?=[^=]")


def _kernel_frames() -> Iterator[FrameType]:
    """The kernel's own frames, innermost first."""
    frame = sys._getframe(1)
    while _in_package(frame):
        frame = frame.f_back
    while frame is not None and not _in_package(frame):
        yield frame
        frame = frame.f_back


def _in_package(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_PACKAGE)


def kernel_site() -> str:
    """The kernel line being executed, as ``file:line in function``, followed by those it was called from."""
    return ", called at ".join(
        f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}" for frame in _kernel_frames()
    )


def assigned_name(default: str) -> str:
    """The variable that the kernel line being executed assigns to, for use as a label."""
    frame = next(_kernel_frames())
    match = _ASSIGNMENT.match(linecache.getline(frame.f_code.co_filename, frame.f_lineno))
    return match.group(1) if match else default
