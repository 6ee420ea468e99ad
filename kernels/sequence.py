"""Which sequence a program works on, and where its rows are: in dense, padded and packed batches.

Packed sequences lie behind each other in one batch of `total` rows: sequence b holds rows cu[b] … cu[b + 1] - 1. Only the
device knows their lengths, so the grid is laid out for the worst case: sequence b owns the tiles from cu[b] // BLOCK + b on.
They are enough, since floor(y / B) + 1 - floor(x / B) >= ceil((y - x) / B). A program finds its sequence by bisection, and does
nothing if its tile is empty. Rows from cu[batch] on form one more sequence, in which queries have no keys and keys no queries,
so that every row of a result is written.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequence(NamedTuple):
    """Sequence b: n_q queries from row q_row on, and n_k keys from row k_row on, of batch `at`. `real` is False of the rows
    behind the last sequence."""

    b: Any
    at: Any
    q_row: Any
    n_q: Any
    k_row: Any
    n_k: Any
    real: Any


@triton.jit
def _boundary(cu, b, total):
    """The row where packed sequence b starts, clamped to 0 … total: no value in cu leads outside of the tensors."""
    start = tl.minimum(tl.maximum(tl.load(cu + b), 0), total).to(tl.int32)
    return tl.where(b == 0, 0, start)


@triton.jit
def _span(cu, b, batch, total):
    """(first row, length) of packed sequence b. b = batch stands for the rows behind the last sequence."""
    start = _boundary(cu, b, total)
    end = tl.where(b < batch, _boundary(cu, tl.minimum(b + 1, batch), total), total)
    return start, tl.maximum(end - start, 0)


@triton.jit
def _owner(cu, slot, batch, total, BLOCK: tl.constexpr):
    """The sequence that owns tile number `slot`: the last b in 0 … batch with cu[b] // BLOCK + b <= slot."""
    lo = 0
    hi = batch + 1
    while hi - lo > 1:
        middle = (lo + hi) // 2
        below = _boundary(cu, middle, total) // BLOCK + middle <= slot
        lo = tl.where(below, middle, lo)
        hi = tl.where(below, hi, middle)
    return lo


@triton.jit
def of_batch(F, b, batch, n_q, n_k):
    """Sequence b of a call that has n_q rows of queries and n_k rows of keys in each batch, or in all if they are packed."""
    if F.cu_q is not None:
        q_row, n_q = _span(F.cu_q, b, batch, n_q)
        k_row, n_k = _span(F.cu_k, b, batch, n_k)
        return Sequence(b, 0, q_row, n_q, k_row, n_k, b < batch)
    else:
        if F.key_lengths is not None:
            n_k = tl.minimum(tl.maximum(tl.load(F.key_lengths + b), 0), n_k).to(tl.int32)
        return Sequence(b, b, 0, n_q, 0, n_k, b < batch)


@triton.jit
def query_tile(F, tile, bh, heads, batch, n_q, n_k, BLOCK: tl.constexpr):
    """(sequence, head, first query) of tile number `tile` of the queries of (batch, head) number bh."""
    if F.cu_q is not None:
        b = _owner(F.cu_q, tile, batch, n_q, BLOCK)
        s = of_batch(F, b, batch, n_q, n_k)
        start = (tile - s.q_row // BLOCK - b) * BLOCK
        n_k = tl.where(s.real & (start < s.n_q), s.n_k, 0)  # a tile without rows needs no keys
        return Sequence(b, 0, s.q_row, s.n_q, s.k_row, n_k, s.real), bh, start
    else:
        return of_batch(F, bh // heads, batch, n_q, n_k), bh % heads, tile * BLOCK


@triton.jit
def locate_queries(F, pid, tiles, heads, batch, n_q, n_k, BLOCK: tl.constexpr):
    """(sequence, head, first query) of program pid in a grid over (batch, head, tile), where the tile varies fastest. The
    last tiles come first, since with a causal mask they take longest."""
    return query_tile(F, tiles - 1 - pid % tiles, pid // tiles, heads, batch, n_q, n_k, BLOCK)


@triton.jit
def locate_keys(F, pid, tiles, heads, batch, n_q, n_k, BLOCK: tl.constexpr):
    """(sequence, key head, first key) of program pid in a grid over (batch, key head, tile), where the tile varies fastest."""
    tile = pid % tiles
    bh = pid // tiles
    if F.cu_q is not None:
        b = _owner(F.cu_k, tile, batch, n_k, BLOCK)
        s = of_batch(F, b, batch, n_q, n_k)
        start = (tile - s.k_row // BLOCK - b) * BLOCK
        n_q = tl.where(s.real & (start < s.n_k), s.n_q, 0)
        return Sequence(b, 0, s.q_row, n_q, s.k_row, s.n_k, s.real), bh, start
    else:
        return of_batch(F, bh // heads, batch, n_q, n_k), bh % heads, tile * BLOCK
