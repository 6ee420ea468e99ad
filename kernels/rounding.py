"""What O loses when it is rounded to 16 bits, stored for a backward with a precise delta.

STATS is (B, heads, STATS_ROWS, n_q) of float32. The first two rows of a head are its stats (softmax.py); the rounding errors
lie behind them. They are n_q rows of 2 * (STATS_ROWS - 2) numbers in the type of O, of which the first HEAD_DIM_V are used.
Where no errors are stored, STATS_ROWS is 2.

delta = rowsum(O * dO) of a rounded O is off by 2^-9 of its largest terms in bfloat16. Where one weight of a row is nearly 1,
that is more than all of dP - delta (Qiu and Yao, "Why low-precision transformer training fails", 2025).
"""

import triton
import triton.language as tl


@triton.jit
def _pointers(STATS, O, seq, h, heads, n_q, start_m, C: tl.constexpr):
    """[BLOCK_M, BLOCK_DV] pointers, in the type of the pointer O, to the errors of rows from start_m on."""
    of_head = STATS + ((seq.at * heads + h).to(tl.int64) * C.STATS_ROWS + 2) * n_q
    width: tl.constexpr = 2 * (C.STATS_ROWS - 2)
    first = of_head.to(tl.pointer_type(O.dtype.element_ty)) + (seq.q_row + start_m).to(tl.int64) * width
    return first + (tl.arange(0, C.BLOCK_M)[:, None] * width + tl.arange(0, C.BLOCK_DV)[None, :])


@triton.jit
def _there(start_m, hi, C: tl.constexpr):
    rows, columns = start_m + tl.arange(0, C.BLOCK_M), tl.arange(0, C.BLOCK_DV)
    return (rows < hi)[:, None] & (columns < C.HEAD_DIM_V)[None, :]


@triton.jit
def store(STATS, O, seq, h, heads, n_q, start_m, o, C: tl.constexpr):
    """Store what o [BLOCK_M, BLOCK_DV], which is float32, loses in the type of the pointer O."""
    kind: tl.constexpr = O.dtype.element_ty
    at = _pointers(STATS, O, seq, h, heads, n_q, start_m, C)
    lost = (o - o.to(kind).to(tl.float32)).to(kind)
    tl.store(at, lost, mask=_there(start_m, seq.n_q, C))


@triton.jit
def load(STATS, O, seq, h, heads, n_q, start_m, C: tl.constexpr):
    """The errors [BLOCK_M, BLOCK_DV] that `store` left, in the type of O."""
    at = _pointers(STATS, O, seq, h, heads, n_q, start_m, C)
    return tl.load(at, mask=_there(start_m, seq.n_q, C), other=0.0)
