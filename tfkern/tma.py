"""Tensors as the tensor memory accelerator of Hopper takes them: descriptors, and those encoded for CUDA's driver.

Triton's launcher encodes every descriptor anew in each call. An encoded one is 128 bytes that follow from pointer, shape,
strides, dtype and block alone: it holds no memory, no context and no stream, and a kernel gets it by value, as in a CUDA graph.
So it is kept, and serves whatever tensor lies there next.
"""

import copy
import functools
import inspect

import torch
from torch import Tensor

from tfkern import layout

ALIGNED = 8  # 16-bit numbers in the 16 bytes that TMA steps by
KEPT = 1024  # encoded descriptors of a parameter: of more tensors than models have layers


def readable(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where TMA can't read it in place."""
    return x if ready(x) else x.resolve_neg().clone(memory_format=torch.contiguous_format)


def ready(x: Tensor) -> bool:
    """Whether rows are dense, and all else multiples of 16 bytes."""
    return _steps(x.shape, x.stride()) and x.data_ptr() % 16 == 0 and not x.is_neg()


@functools.lru_cache(maxsize=4096)
def _steps(shape: tuple, stride: tuple) -> bool:
    steps = [s for s, n in zip(stride[:3], shape[:3], strict=True) if n > 1]
    return (stride[3] == 1 or shape[3] == 1) and all(s > 0 and s % ALIGNED == 0 for s in steps)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Those of a `ready` tensor's first three dims, as the kernels take them (kernels/tile.py, VEC 8)."""
    return tuple(layout.encode(s // ALIGNED if n > 1 else 0) for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))


def descriptor(x: Tensor, rows: int, dim: int):
    """Of (B, H, N, D) in blocks of (1, 1, rows, dim)."""
    block, swizzled, make = _swizzled(rows, dim)
    # A dim of size 1 is never stepped along: its stride is noise that TMA might refuse.
    steps = [s if n > 1 else ALIGNED for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return make(x, list(x.shape), [*steps, 1], block, swizzled)


@functools.cache
def _swizzled(rows: int, dim: int):
    """(block, its layout in shared memory, the class of descriptors): Triton takes longer to find a layout than all else."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, dim]
    return block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16), TensorDescriptor  # float16's layout is the same


class Maps(dict):
    """A parameter of a compiled kernel that is a descriptor: by what decides on it, the arguments that it becomes."""

    def __init__(self, metadata: dict):
        super().__init__()
        self.metadata = metadata

    def add(self, key: tuple, described) -> tuple:
        """(encoded descriptor, *shape, *strides)"""
        make, more = _triton_encoder()
        if len(self) >= KEPT:
            self.clear()
        self[key] = found = tuple(make(described, self.metadata, *more))
        return found


def unwrapped(compiled) -> tuple:
    """(launcher, Maps of the descriptors) of a kernel: Triton's launcher without the part that encodes. Where this Triton has
    it in another way than those we know, its launcher as it is, and no Maps."""
    encodes = getattr(compiled.run, "launch", None)
    inner = inspect.getclosurevars(encodes).nonlocals if inspect.isfunction(encodes) else {}
    found = inner.get("tensordesc_meta") or [None]
    if None in found or "launcher" not in inner:
        return compiled.run, ()
    run = copy.copy(compiled.run)
    run.launch = inner["launcher"]
    return run, tuple(map(Maps, found))


@functools.cache
def _triton_encoder() -> tuple:
    """What encodes a descriptor with its metadata, and the rest of its arguments, which it has no use for on NVIDIA."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg, (None,) * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)
