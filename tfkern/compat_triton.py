"""The undocumented names of Triton that tfkern and bench use: beside each, what it is for and what is done without it.

Whoever needs such a name asks here, so that a Triton that has moved one costs what this file says and nothing else. compat.py
has those of PyTorch. This file imports neither torch nor, before it is asked, Triton: the compile gates need no torch.
"""

import copy
import functools
import inspect
import pkgutil
from collections.abc import Callable

MOVED: list[str] = []  # names that were asked for and are not there


def found(name: str):
    """What "module:name" is; None where it is not there."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        MOVED.append(name)
        return None


def needed(name: str):
    """What "module:name" is; ImportError where it is not there."""
    if (value := found(name)) is None:
        raise ImportError(f"this Triton has no {name.replace(':', '.')}, without which this can't be done")
    return value


# The current device and stream as Triton's launches ask for them: an object whose `active` has get_current_device() and
# get_current_stream(device). Without it: torch.cuda is asked, which is slower.
@functools.cache
def driver():
    return found("triton.runtime:driver") or _TorchDriver


class _TorchDriver:
    """torch.cuda in the place of Triton's driver."""

    @staticmethod
    def get_current_device() -> int:
        import torch

        return torch.cuda.current_device()

    @staticmethod
    def get_current_stream(device: int) -> int:
        import torch

        return torch.cuda.current_stream(device).cuda_stream


_TorchDriver.active = _TorchDriver


# Whether a profiler wants to be told of launches, which only the JIT's own path tells it. Without it: perhaps, and every launch
# takes that path.
@functools.cache
def _knobs():
    return found("triton.knobs:runtime")


def hooked() -> bool:
    runtime = _knobs()
    if runtime is None:
        return True
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# A kernel that the JIT has compiled and loaded: its launcher in C, the function on the device, and the metadata that the
# launcher gets. Without them: every launch is the JIT's.
def loaded(compiled) -> tuple | None:
    parts = tuple(getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))
    return None if None in parts else parts


# The launcher without the part that encodes descriptors, and the metadata of each, which Triton 3.6 to 3.9 hold in a closure.
# Without them, or without what encodes one: the launcher as it is, which encodes every descriptor in every launch.
def without_encoder(run) -> tuple[object, tuple]:
    wrapped = getattr(run, "launch", None)
    inner = inspect.getclosurevars(wrapped).nonlocals if inspect.isfunction(wrapped) else {}
    metadata = inner.get("tensordesc_meta") or [None]
    if None in metadata or "launcher" not in inner or _encoder() is None:
        return run, ()
    bare = copy.copy(run)
    bare.launch = inner["launcher"]
    return bare, tuple(metadata)


@functools.cache
def _encoder() -> tuple | None:
    """What encodes a descriptor with its metadata, and the rest of its arguments, which it has no use for on NVIDIA."""
    make = found("triton.backends.nvidia.driver:make_tensordesc_arg")
    return make and (make, (None,) * (len(inspect.signature(make).parameters) - 2))


def encode(described, metadata) -> tuple:
    """(encoded descriptor, *shape, *strides), where without_encoder() gave its metadata."""
    make, rest = _encoder()
    return tuple(make(described, metadata, *rest))


# The interpreter's module: its InterpreterBuilder, TensorHandle and interpreter_builder are mended by interpreter.py. Without
# it: ImportError, as kernels would give wrong results.
def interpreter():
    return needed("triton.runtime.interpreter")


def replace_patching(make: Callable[[Callable], Callable]) -> None:
    """Put make(f) in the place of f, by which the interpreter replaces triton.language at each call of a device function.
    Without it: the language is replaced each time, which takes half of the interpreter's time."""
    module, original = interpreter(), found("triton.runtime.interpreter:_patch_lang")
    if original is not None:
        module._patch_lang = make(original)


# For the tools of bench/, which need what they ask for: without it they end with ImportError.


def target(backend: str, arch: int | str, lanes: int):
    """What to compile for, as triton.compile takes it."""
    return needed("triton.backends.compiler:GPUTarget")(backend, arch, lanes)


def source_kind(gluon: bool = False):
    """The class of what triton.compile compiles."""
    return needed("triton.experimental.gluon._runtime:GluonASTSource" if gluon else "triton.compiler:ASTSource")


def ptxas(capability: int) -> str:
    """The path of the assembler that Triton runs."""
    return needed("triton.backends.nvidia.compiler:get_ptxas")(capability).path


def nvidia_driver():
    """The module that loads and launches kernels on NVIDIA."""
    return needed("triton.backends.nvidia.driver")


def after_loading(hook: Callable) -> None:
    """Call `hook` after each kernel that is loaded."""
    needed("triton.knobs:runtime").kernel_load_end_hook.add(hook)


def around_compiling(make: Callable[[Callable], Callable]) -> None:
    """Put make(compile) in the place of `compile`, which each kernel's first launch looks up. Without it: nothing happens."""
    if (compiler := found("triton.compiler")) is not None:
        compiler.compile = make(compiler.compile)
