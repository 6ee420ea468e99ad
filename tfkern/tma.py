"""Tensors as the tensor memory accelerator of Hopper takes them: descriptors, and those encoded for CUDA's driver.

Triton's launcher encodes every descriptor anew in each call. An encoded one is 128 bytes that follow from pointer, shape,
strides, dtype and block alone: it holds no memory, no context and no stream, and a kernel gets it by value, as in a CUDA graph.
So it is kept, and serves whatever tensor lies there next.
"""

import functools

import torch
from torch import Tensor

from tfkern import compat_triton, layout

ALIGNED = 8  # 16-bit numbers in the 16 bytes that TMA steps by
KEPT = 1024  # encoded descriptors of a parameter: of more tensors than models have layers


def readable(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where TMA can't read it in place."""
    return x if ready(x) else x.resolve_neg().clone(memory_format=torch.contiguous_format)


def ready(x: Tensor) -> bool:
    """Whether rows are dense, and all else multiples of 16 bytes."""
    return able(x) and x.data_ptr() % 16 == 0 and not x.is_neg()


def able(x: Tensor) -> bool:
    """Whether its shape and strides are such; TMA has no empty tensors."""
    return x.numel() > 0 and _steps(x.shape, x.stride())


@functools.lru_cache(maxsize=4096)
def _steps(shape: tuple, stride: tuple) -> bool:
    steps = [s for s, n in zip(stride[:3], shape[:3], strict=True) if n > 1]
    return (stride[3] == 1 or shape[3] == 1) and all(s > 0 and s % ALIGNED == 0 for s in steps)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Those of a `ready` tensor's first three dims, as the kernels take them (kernels/tile.py, VEC 8)."""
    return tuple(layout.encode(s // ALIGNED if n > 1 else 0) for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))


def descriptor(x: Tensor, rows: int, dim: int, gluon: bool = True):
    """Of (B, H, N, D) in blocks of (1, 1, rows, dim), for a kernel in Gluon or in plain Triton, which finds a layout itself."""
    block, make, *more = _gluon(rows, dim) if gluon else _plain(rows, dim)
    # A dim of size 1 is never stepped along: its stride is noise that TMA might refuse.
    steps = [s if n > 1 else ALIGNED for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return make(x, list(x.shape), [*steps, 1], block, *more)


@functools.cache
def _plain(rows: int, dim: int) -> tuple:
    """(block, the class of descriptors)"""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [1, 1, rows, dim], TensorDescriptor


@functools.cache
def _gluon(rows: int, dim: int) -> tuple:
    """(block, the class of descriptors, the layout in shared memory): Triton takes longer to find that than all else."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, dim]
    return block, TensorDescriptor, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # float16's layout is the same


class Maps(dict):
    """A parameter of a compiled kernel that is a descriptor: by what decides on it, the arguments that it becomes."""

    def __init__(self, metadata: dict):
        super().__init__()
        self.metadata = metadata

    def add(self, key: tuple, described) -> tuple:
        """(encoded descriptor, *shape, *strides)"""
        if len(self) >= KEPT:
            self.clear()
        self[key] = encoded = compat_triton.encode(described, self.metadata)
        return encoded


def unwrapped(run) -> tuple:
    """(launcher, Maps of the descriptors) of a compiled kernel's launcher: the same without the part that encodes. Where this
    Triton has it in another way than those we know, its launcher as it is, and no Maps."""
    bare, metadata = compat_triton.without_encoder(run)
    return bare, tuple(map(Maps, metadata))
