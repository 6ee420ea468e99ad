"""Which sequence a program works on, and where its rows are: dense batches, padded ones, and packed ones.

Packed sequences lie behind each other in one batch of `total` rows; sequence b holds rows cu[b] … cu[b + 1] - 1. How long they
are only the device knows, so a grid is laid out for the worst case without asking: sequence b owns the tiles from
cu[b] // BLOCK + b on, which are enough for it, since floor(y / B) + 1 - floor(x / B) >= ceil((y - x) / B). A program finds its
sequence by bisection; tiles that turn out empty do nothing. Rows from cu[batch] on belong to a last sequence, without partners,
so that every row of a result is written.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequence(NamedTuple):
    """Sequence b: n_q queries from row q_row and n_k keys from row k_row of batch `at`; not `real`: what is behind the last."""

    b: Any
    at: Any
    q_row: Any
    n_q: Any
    k_row: Any
    n_k: Any
    real: Any


@triton.jit
def _boundary(cu, b, total):
    """Where packed sequence b starts; nothing in cu can lead outside of 0 … total."""
    start = tl.minimum(tl.maximum(tl.load(cu + b), 0), total).to(tl.int32)
    return tl.where(b == 0, 0, start)


@triton.jit
def _span(cu, b, batch, total):
    """(first row, length) of packed sequence b; b = batch is what is left behind the last."""
    start = _boundary(cu, b, total)
    end = tl.where(b < batch, _boundary(cu, tl.minimum(b + 1, batch), total), total)
    return start, tl.maximum(end - start, 0)


@triton.jit
def _owner(cu, slot, batch, total, BLOCK: tl.constexpr):
    """The last b in 0 … batch with cu[b] // BLOCK + b <= slot."""
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
    """Sequence b of a call with n_q query rows and n_k key rows a batch, or in all where packed."""
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
    """(sequence, head, first query) of a tile of queries of (batch, head) number bh."""
    if F.cu_q is not None:
        b = _owner(F.cu_q, tile, batch, n_q, BLOCK)
        s = of_batch(F, b, batch, n_q, n_k)
        start = (tile - s.q_row // BLOCK - b) * BLOCK
        n_k = tl.where(s.real & (start < s.n_q), s.n_k, 0)  # a tile without rows has nothing to do
        return Sequence(b, 0, s.q_row, s.n_q, s.k_row, n_k, s.real), bh, start
    else:
        return of_batch(F, bh // heads, batch, n_q, n_k), bh % heads, tile * BLOCK


@triton.jit
def locate_queries(F, pid, tiles, heads, batch, n_q, n_k, BLOCK: tl.constexpr):
    """(sequence, head, first query) of a program of a grid over (batch, head, tile), tile fastest. The last tiles come first:
    under a causal mask they are the longest."""
    return query_tile(F, tiles - 1 - pid % tiles, pid // tiles, heads, batch, n_q, n_k, BLOCK)


@triton.jit
def locate_keys(F, pid, tiles, heads, batch, n_q, n_k, BLOCK: tl.constexpr):
    """(sequence, key head, first key) of a program of a grid over (batch, key head, tile), tile fastest."""
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
