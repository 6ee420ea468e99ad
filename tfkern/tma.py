"""Tensors as the tensor memory accelerator of Hopper takes them: descriptors."""

import functools

import torch
from torch import Tensor

from tfkern import layout

ALIGNED = 8  # 16-bit numbers in the 16 bytes that TMA steps by


def readable(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where TMA can't read it in place."""
    return x if ready(x) else x.resolve_neg().clone(memory_format=torch.contiguous_format)


def ready(x: Tensor) -> bool:
    """Whether rows are dense, and all else multiples of 16 bytes."""
    steps = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    dense = x.stride(3) == 1 or x.shape[3] == 1
    return dense and all(s > 0 and s % ALIGNED == 0 for s in steps) and x.data_ptr() % 16 == 0 and not x.is_neg()


def descriptor(x: Tensor, rows: int, dim: int):
    """Of (B, H, N, D) in blocks of (1, 1, rows, dim)."""
    block, swizzled, make = _swizzled(rows, dim)
    # A dim of size 1 is never stepped along: its stride is noise that TMA might refuse.
    strides = [s if n > 1 else ALIGNED for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return make(x, list(x.shape), [*strides, 1], block, swizzled)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Those of a `ready` tensor's first three dims, as the kernels take them (kernels/tile.py, VEC 8)."""
    return tuple(layout.encode(s // ALIGNED if n > 1 else 0) for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))


@functools.cache
def _swizzled(rows: int, dim: int):
    """(block, its layout in shared memory, the class of descriptors): Triton takes longer to find a layout than all else."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, dim]
    return block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16), TensorDescriptor  # float16's layout is the same
