"""Launching kernels: which architecture a device has, on which its tiles depend, and the call itself.

Triton's own launch path binds and classifies every argument in Python, for each call. A Launch does that once: what it found
is kept as a Handle under all that a compiled kernel depends on, and further calls go straight to the C launcher.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import operator
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import compat_triton, interpreter, tma

ALIGNMENT = 16  # bytes; the JIT compiles a form of its own for pointers that are multiples of it
BUFFER = 2**31  # bytes; on AMD also for each tensor whose memory is smaller: 32 bits are enough to address it


@functools.cache
def missing() -> str | None:
    """Why Triton can't be used here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install fails in many ways; each is a reason, none is ours to hide
        return f"Triton is installed but does not import: {error!r}"
    return None


@functools.cache
def architecture(device: torch.device) -> str:
    """ "interpreter", "sm_90", "gfx942" … of a device."""
    if interpreter.interpreting():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has: what persistent kernels share their work out to. On a CPU, where they are simulated, so few that
    each has several items to do."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def triton_version() -> tuple[int, int]:
    """Major and minor, of the Triton that is installed."""
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


def unsupported(device: torch.device) -> list[str]:
    """The reasons why kernels can't run on a device."""
    reasons = [reason] if (reason := missing()) else []
    if device.type == "cpu":
        if not interpreter.interpreting():
            reasons.append("CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 before the first import)")
    elif device.type != "cuda":
        reasons.append(f"runs on CUDA and ROCm devices, not on {device.type}")
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("needs compute capability 8.0 or newer")
    return reasons


class Handle(NamedTuple):
    """A compiled kernel, loaded on one device."""

    run: object  # the C launcher
    function: int
    metadata: tuple
    kernel: object  # keeps the module loaded
    maps: tuple[tma.Maps, ...] = ()  # of its descriptors


# By what a compiled kernel depends on, not by lengths, so that a new length finds what an old one compiled.
_handles: dict[tuple, Handle] = {}


_serial = itertools.count()


class Launch:
    """`grid` programs of a kernel on a device, everything given but the tensors, and of those the shapes.

    The kernel's parameters are the tensors of `names`, where one may stand twice; then its Features, then `numbers`, then
    `constants` by name; `options` are for the compiler (num_warps …). It gets the first of the tensors as TMA descriptors, of
    which `blocks` has what tma.descriptor takes beside the tensor. planner.py makes it all.
    """

    def __init__(
        self, kernel, grid: int, device: torch.device, names: tuple[str, ...], numbers: tuple, constants: dict, options: dict,
        blocks: tuple = (),
    ):  # fmt: skip
        self.kernel, self.grid, self.device, self.index = kernel, grid, device, device.index or 0
        self.names, self.numbers, self.constants, self.options, self.blocks = names, numbers, constants, options, blocks
        self.count, self.in_order = len(set(names)), operator.itemgetter(*names)
        self.tail = (*numbers, *constants.values())
        self.handles: dict[tuple, Handle] = {}
        self.serial = next(_serial)  # not id(self), which another may have later

    def __call__(self, features: tuple = (), feature_tensors: tuple = (), /, **tensors: Tensor | None) -> None:
        """Run it on the current stream of the device; feature_tensors are those within `features`."""
        if self.grid == 0:
            return
        given = self.ordered(tensors)
        if interpreter.interpreting():
            arguments = (*self.described(given), features, *self.numbers)
            interpreter.run(self.kernel, self.grid, arguments, {**self.constants, **self.options})
            return
        driver = compat_triton.driver().active
        if driver.get_current_device() != self.index:
            with torch.cuda.device(self.device):
                self(features, feature_tensors, **tensors)
            return
        pointers = [None if x is None else x.data_ptr() for x in given]
        form = _form(pointers, feature_tensors)
        if torch.version.hip:
            memory = (x for x in (*given, *feature_tensors) if x is not None)
            form = form, *(x.untyped_storage().size() < BUFFER for x in memory)
        handle = self.handles.get(form) or self._known(form, given, features)
        if handle is None or compat_triton.hooked():
            self._compiled(form, given, features, self.by_jit(features, **tensors))
            return
        if self.blocks:
            pointers = self._mapped(handle.maps, given, pointers)
        handle.run(
            self.grid, 1, 1, driver.get_current_stream(self.index), handle.function, handle.metadata, None, None, None,
            *pointers, features, *self.tail,
        )  # fmt: skip

    def by_jit(self, features: tuple, /, **tensors: Tensor | None):
        """Run it by Triton's own launch path, which compiles what is not compiled yet; the compiled kernel."""
        arguments = (*self.described(self.ordered(tensors)), features, *self.numbers)
        return self.kernel[(self.grid,)](*arguments, **self.constants, **self.options)

    def ordered(self, tensors: dict[str, Tensor | None]) -> tuple:
        """The tensors as the kernel's parameters stand; TypeError for others than the kernel's."""
        if len(tensors) == self.count:
            try:
                return self.in_order(tensors)
            except KeyError:
                pass
        raise TypeError(f"{self.kernel.__name__} is launched with {[*self.names]}, not with {[*tensors]}")

    def described(self, tensors: tuple) -> tuple:
        """Tensors in the kernel's order, the first of them as TMA descriptors."""
        count = len(self.blocks)
        return *(tma.descriptor(x, *block) for x, block in zip(tensors[:count], self.blocks, strict=True)), *tensors[count:]

    def _mapped(self, maps: tuple, tensors: tuple, pointers: list) -> list:
        """What the C launcher gets for the tensors: for descriptors, what was encoded when a tensor lay so before."""
        if not maps:
            return [*self.described(tensors)[: len(self.blocks)], *pointers[len(self.blocks) :]]
        arguments = []
        for i, kept in enumerate(maps):
            x = tensors[i]
            key = self.serial, pointers[i], x.stride()  # the serial stands for shape, block and dtype
            arguments += kept.get(key) or kept.add(key, tma.descriptor(x, *self.blocks[i]))
        return arguments + pointers[len(maps) :]

    def _compiled(self, form, tensors: tuple, features: tuple, kernel) -> None:
        """Keep what the JIT has launched, if it can be launched without it."""
        if (parts := compat_triton.loaded(kernel)) is None:
            return
        run, function, metadata = parts
        run, maps = tma.unwrapped(run) if self.blocks else (run, ())
        handle = Handle(run, function, metadata, kernel, maps)
        _handles[self._key(form, tensors, features)] = self.handles[form] = handle

    def _known(self, form, tensors: tuple, features: tuple) -> Handle | None:
        """What another length has compiled."""
        handle = _handles.get(self._key(form, tensors, features))
        if handle is not None:
            self.handles[form] = handle
        return handle

    def _key(self, form, tensors: tuple, features: tuple) -> tuple:
        """All that the JIT compiles anew for, and the device."""
        kinds = _kinds((tensors, features, self.numbers))
        return self.kernel, self.index, form, kinds, self.blocks, *self.constants.items(), *self.options.items()


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Within the block, how often each kernel is launched, by its name, on the current device or in the interpreter."""
    counts, launch = Counter(), Launch.__call__

    def counted(self, *features, **tensors):
        counts[self.kernel.__name__] += 1
        launch(self, *features, **tensors)

    Launch.__call__ = counted
    try:
        yield counts
    finally:
        Launch.__call__ = launch


def _form(pointers: list, feature_tensors: tuple):
    """Which pointers are aligned: 0 where all are, as almost always."""
    together = 0
    for pointer in pointers:
        if pointer is not None:
            together |= pointer
    for tensor in feature_tensors:
        together |= tensor.data_ptr()
    if together % ALIGNMENT == 0:
        return 0
    return tuple(p is None or p % ALIGNMENT == 0 for p in (*pointers, *(x.data_ptr() for x in feature_tensors)))


def _kinds(x):
    """The types of arguments as the JIT tells them apart. No parameter of our kernels is specialised on its number."""
    if isinstance(x, tuple):
        return tuple(map(_kinds, x))
    if isinstance(x, Tensor):
        return x.dtype
    if isinstance(x, int):
        return "i32" if -(2**31) <= x < 2**31 else "i64"
    return type(x)
