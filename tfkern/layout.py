"""Strides: the memory order of results, and what the kernels may assume of their arguments."""

import functools
import math

import torch
from torch import Tensor

from tfkern import compat

MAX_VEC = 16
MASK_VEC = 8
MANY = 10**9  # more rows than there can be
MAX_ROW_STRIDE = 2**31 // 256  # so that 256 rows, more than any tile has, stay within int32


def empty_in_order_of(like: Tensor, last_dim: int) -> Tensor:
    """Uninitialised (B, H, N, last_dim) whose first three dims lie in memory in the order that they have in `like`, dense."""
    # Not a permuted view of a dense tensor: autograd forbids in-place changes of views that a Function returns.
    strides = strides_in_order_of(like, last_dim)
    return torch.empty_strided((*like.shape[:3], last_dim), strides, dtype=like.dtype, device=like.device)


class Blank:
    """A result of a kernel before there is memory for it."""

    def __init__(self, shape: tuple, strides: tuple, dtype: torch.dtype, device: torch.device):
        self.shape, self.strides = shape, strides
        self.options = dict(dtype=dtype, device=device)

    @classmethod
    def in_order_of(cls, like: Tensor, last_dim: int) -> "Blank":
        """As empty_in_order_of."""
        return cls((*like.shape[:3], last_dim), strides_in_order_of(like, last_dim), like.dtype, like.device)

    @classmethod
    def contiguous(cls, shape: tuple, dtype: torch.dtype, device: torch.device) -> "Blank":
        strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
        return cls(shape, strides, dtype, device)

    def stride(self) -> tuple:
        return self.strides

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, **self.options)


def strides_in_order_of(like: Tensor, last_dim: int) -> tuple[int, int, int, int]:
    """Strides of that."""
    try:
        return _known_strides(like.shape[:3], like.stride(), last_dim)
    except TypeError:  # symbols of torch.compile can't be keys
        return _strides(like.shape[:3], like.stride(), last_dim)


def _strides(shape: tuple, stride: tuple, last_dim: int) -> tuple[int, int, int, int]:
    # Stable, and blind to dims of size 1 or stride 0, which say nothing about order: they stay where they stand.
    sizes, steps = ([_number(x) for x in numbers] for numbers in (shape, stride))
    telling = [d for d in range(3) if sizes[d] > 1 and steps[d] > 0]
    placed = iter(sorted(telling, key=steps.__getitem__, reverse=True))
    order = [next(placed) if d in telling else d for d in range(3)]
    strides, step = [0, 0, 0, 1], last_dim
    for d in reversed(order):
        strides[d], step = step, step * shape[d]
    return tuple(strides)


_known_strides = functools.lru_cache(maxsize=4096)(_strides)


def _number(n) -> int:
    """A size or stride as a number. One that data decide on nobody knows while torch.compile traces: there it counts as large.
    (As every number but 0 and 1, it puts the strides of a dense tensor in their order, and those of such dims say nothing.)"""
    return n if isinstance(n, int) else compat.with_unknown_as(n, MANY)


def kernel_strides(*tensors: Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """(VEC, strides of each 4-D tensor) as kernels/tile.py wants them.

    Where every last dim has stride 1 (and no row stride is huge), VEC is the largest power of two up to 16 that divides all
    other strides, and those are in units of VEC. It depends on head counts and head dims, not on lengths. Otherwise VEC is 0
    and strides are in elements.

    A stride s is sent as 2 s + 3: Triton's JIT compiles anew for entries of a tuple that become 1 or a multiple of 16, and
    these never do.
    """
    # A dim of size 1 is never stepped along: its stride is noise, and would cost alignment or a recompile.
    strides = [tuple(s if n > 1 else 0 for s, n in zip(t.stride(), t.shape, strict=True)) for t in tensors]
    if any((s[3] != 1 and t.shape[3] > 1) or s[2] >= MAX_ROW_STRIDE for s, t in zip(strides, tensors, strict=True)):
        return 0, [tuple(map(encode, s)) for s in strides]
    vec = math.gcd(MAX_VEC, *(x for s in strides for x in s[:3]))
    return vec, [tuple(encode(x // vec) for x in s[:3]) for s in strides]


def mask_strides(mask: Tensor) -> tuple[int, tuple[int, ...]]:
    """(VEC, strides) of a (B, H, Nq, Nk) mask whose dims of size 1 broadcast. Where keys lie side by side, VEC is 8 if all rows
    are aligned to that many elements, else 1: two compiled forms, whatever the lengths. Otherwise it is 0."""
    strides = tuple(s if n > 1 else 0 for s, n in zip(mask.stride(), mask.shape, strict=True))
    if strides[3] != 1 or strides[2] >= MAX_ROW_STRIDE:
        return 0, tuple(map(encode, strides))
    vec = 1 if any(s % MASK_VEC for s in strides[:3]) else MASK_VEC
    return vec, tuple(encode(s // vec) for s in strides[:3])


def encode(n: int) -> int:
    """A whole number as kernels take it in tuples."""
    return 2 * n + 3


def last_dim_dense(x: Tensor) -> Tensor:
    """x, copied only if its last dim isn't dense, as a gradient expanded from a sum is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def like_order(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory order of `like`, copied only if it isn't."""
    wanted = strides_in_order_of(like, x.shape[-1])
    if x.numel() == 0 or x.stride() == wanted:
        return x
    if all(a == b for a, b, n in zip(x.stride(), wanted, x.shape, strict=True) if n > 1):
        return x.as_strided(x.shape, wanted)  # a dim of size 1 is never stepped along
    return empty_in_order_of(like, x.shape[-1]).copy_(x)


def deliver(x: Tensor, like: Tensor, into: Tensor | None) -> Tensor:
    """x written into a tensor that is there, or in the dtype and memory order of `like`."""
    return like_order(x.to(like.dtype), like) if into is None else into.copy_(x)


def zeros_in_order_of(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros shaped and ordered as `like`, in another dtype."""
    return torch.zeros_like(empty_in_order_of(like, like.shape[-1]), dtype=dtype)
