"""Bounds-checked loads and stores of rows of one head's (N, HEAD_DIM) matrix.

A tensor is addressed by its pointer and a tuple of strides (batch, head, row, column). `VEC` says what the compiler may
assume of them: with VEC = v > 0 the last dimension has stride 1 and the other strides are given in units of v elements, so
that loads vectorise whatever the sequence length (a stride that is a plain run-time number would not, and specialising on
it would recompile for new lengths). With VEC = 0 all four strides are in elements and free. A stride s arrives as 2 s + 3, a
number that Triton's JIT never specialises on. Addresses are int64: tensors beyond 2**31 elements are ordinary.

Or a tensor is a TMA descriptor of (B, H, N, HEAD_DIM) in blocks of (1, 1, rows, BLOCK_D), and None stands for its strides: it
needs no addresses, which leaves registers. It knows the tensor's ends, and no others.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def whole(n):
    """The whole number that was sent as 2 n + 3."""
    return (n - 3) // 2


@triton.jit
def stride_of(stride, dim: tl.constexpr, VEC: tl.constexpr):
    """The stride of a dimension in elements, int64."""
    s = whole(stride[dim]).to(tl.int64)
    if VEC > 0:
        s = s * VEC
    return s


class Described(NamedTuple):
    """The matrix of head h in batch b behind a descriptor, from a row on."""

    descriptor: Any
    b: Any
    h: Any
    row: Any


@triton.jit
def head(ptr, stride, b, h, row, VEC: tl.constexpr):
    """Pointer to a row of head h in batch b, or what stands for it with a descriptor."""
    if stride is None:
        return Described(ptr, b, h, row)
    else:
        return ptr + b * stride_of(stride, 0, VEC) + h * stride_of(stride, 1, VEC) + row * stride_of(stride, 2, VEC)


@triton.jit
def pointers(ptr, stride, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """[ROWS, COLUMNS] pointers to rows from `start` and columns from 0."""
    row = stride_of(stride, 2, VEC)
    ptr += start * row
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    if VEC > 0:  # within a tile int32 suffices (layout.kernel_strides sees to it) and saves registers
        return ptr + (rows * row.to(tl.int32) + cols)
    else:
        return ptr + (rows * row + cols * stride_of(stride, 3, VEC))


@triton.jit
def _mask(start, lo, hi, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    keep = ((rows >= lo) & (rows < hi))[:, None]
    if HEAD_DIM < BLOCK_D:
        keep = keep & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return keep


@triton.jit
def load(
    ptr, stride, start, lo, hi,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + ROWS) of an (N, HEAD_DIM) matrix as [ROWS, BLOCK_D]. Columns beyond HEAD_DIM are 0; so are rows
    outside [lo, hi) where MASKED, and they are not read. Without MASKED the caller knows that every row is inside. With a
    descriptor the caller knows that start >= lo, and that hi is the last row's end."""
    if stride is None:
        return ptr.descriptor.load([ptr.b, ptr.h, ptr.row + start, 0]).reshape(ROWS, BLOCK_D)
    elif MASKED:
        at = pointers(ptr, stride, start, ROWS, BLOCK_D, VEC)
        return tl.load(at, mask=_mask(start, lo, hi, ROWS, HEAD_DIM, BLOCK_D), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        at = pointers(ptr, stride, start, ROWS, BLOCK_D, VEC)
        return tl.load(at, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers(ptr, stride, start, ROWS, BLOCK_D, VEC))


@triton.jit
def store(
    ptr, stride, start, hi, value, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Write value [ROWS, BLOCK_D] to rows from start and below hi, columns below HEAD_DIM, in the pointer's dtype."""
    at = pointers(ptr, stride, start, ROWS, BLOCK_D, VEC)
    tl.store(at, value.to(ptr.dtype.element_ty), mask=_mask(start, start, hi, ROWS, HEAD_DIM, BLOCK_D))


@triton.jit
def load_row_values(ptr, rows, lo, hi, other, MASKED: tl.constexpr):
    """One number a row, and `other` for rows outside [lo, hi) where MASKED."""
    if MASKED:
        return tl.load(ptr + rows, mask=(rows >= lo) & (rows < hi), other=other)
    else:
        return tl.load(ptr + rows)
