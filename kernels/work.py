"""A tile of queries and the keys that stream past it: what the forward, dQ and the gradient of a bias have in common."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import score, tile


class Work(NamedTuple):
    """The queries from start_m on, and the keys [lo, hi) of their head that they need."""

    K: Any  # pointers to the key head's first row (tile.head)
    V: Any
    stride_k: Any
    stride_v: Any
    start_m: Any
    lo: Any
    hi: Any
    left: Any  # which keys a query sees (band.py)
    right: Any
    scorer: Any
    bh: Any  # number of the head among the heads of all sequences, for dropout


@triton.jit
def load_k(work, start_n, C: tl.constexpr, MASKED: tl.constexpr):
    """The tile of keys [BLOCK_N, BLOCK_D] from start_n on."""
    return tile.load(work.K, work.stride_k, start_n, work.lo, work.hi, C.BLOCK_N, C.HEAD_DIM, C.BLOCK_D, C.VEC, MASKED)


@triton.jit
def load_v(work, start_n, C: tl.constexpr, MASKED: tl.constexpr):
    """The tile of values [BLOCK_N, BLOCK_DV] of the keys from start_n on."""
    return tile.load(work.V, work.stride_v, start_n, work.lo, work.hi, C.BLOCK_N, C.HEAD_DIM_V, C.BLOCK_DV, C.VEC, MASKED)


@triton.jit
def logits(s, offs_m, offs_n, start_n, work, F, C: tl.constexpr, MASKED: tl.constexpr):
    """score.logits from the products s [BLOCK_M, BLOCK_N] of queries offs_m, from work.start_m on, and keys offs_n, from
    start_n on."""
    return score.logits(
        s,
        offs_m[:, None],
        offs_n[None, :],
        work.start_m,
        start_n,
        F,
        work.scorer,
        work.left,
        work.right,
        C,
        MASKED,
        RAGGED=MASKED,
    )
