"""Bounds-checked loads and stores of rows of one head's matrix (N, HEAD_DIM).

A tensor is given by its pointer and a tuple of strides (batch, head, row, column). VEC says what the compiler may assume of
them. With VEC = v > 0 the last dimension has stride 1, and the other strides are given in units of v elements: loads vectorise
whatever the sequence length. A plain run-time number as a stride would prevent that, and specialising on it would recompile for
new lengths. With VEC = 0 all four strides are in elements and free. A stride s is passed as 2 s + 3, on which Triton's JIT
never specialises. Addresses are int64: tensors beyond 2**31 elements are ordinary.

Or a tensor is given by a TMA descriptor of (B, H, N, HEAD_DIM) in blocks of (1, 1, rows, BLOCK_D), with None for its strides. A
descriptor needs no addresses, which saves registers. It checks the bounds of the tensor and no others.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def whole(n):
    """The whole number n that was passed as 2 n + 3."""
    return (n - 3) // 2


@triton.jit
def stride_of(stride, dim: tl.constexpr, VEC: tl.constexpr):
    """The stride of dimension `dim` in elements, int64."""
    s = whole(stride[dim]).to(tl.int64)
    if VEC > 0:
        s = s * VEC
    return s


class Described(NamedTuple):
    """The matrix of head h in batch b behind a descriptor, from `row` on."""

    descriptor: Any
    b: Any
    h: Any
    row: Any


@triton.jit
def head(ptr, stride, b, h, row, VEC: tl.constexpr):
    """Pointer to `row` of head h in batch b; of a descriptor, Described."""
    if stride is None:
        return Described(ptr, b, h, row)
    else:
        return ptr + b * stride_of(stride, 0, VEC) + h * stride_of(stride, 1, VEC) + row * stride_of(stride, 2, VEC)


@triton.jit
def pointers(ptr, stride, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """[ROWS, COLUMNS] pointers to the rows from `start` on and the columns from 0 on."""
    row = stride_of(stride, 2, VEC)
    ptr += start * row
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    if VEC > 0:  # offsets within a tile fit int32, which saves registers; layout.kernel_strides checks it
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
    """Rows [start, start + ROWS) of a matrix (N, HEAD_DIM) as [ROWS, BLOCK_D]. Columns beyond HEAD_DIM are 0.

    With MASKED, rows outside [lo, hi) are 0 and are not read. Without it, the caller knows that every row is inside. With a
    descriptor, the caller knows that start >= lo, and that the tensor ends at hi.
    """
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
    """Write value [ROWS, BLOCK_D] to the rows from start on that are below hi, and the columns below HEAD_DIM, in the pointer's
    dtype."""
    at = pointers(ptr, stride, start, ROWS, BLOCK_D, VEC)
    tl.store(at, value.to(ptr.dtype.element_ty), mask=_mask(start, start, hi, ROWS, HEAD_DIM, BLOCK_D))


@triton.jit
def load_row_values(ptr, rows, lo, hi, other, MASKED: tl.constexpr):
    """One number a row. With MASKED it is `other` for rows outside [lo, hi)."""
    if MASKED:
        return tl.load(ptr + rows, mask=(rows >= lo) & (rows < hi), other=other)
    else:
        return tl.load(ptr + rows)
