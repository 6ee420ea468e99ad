"""What the partitions of flash_bwd share: the work, the memory, and where in them they are."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import band, score, sequence
from ..static import Static


class Work(NamedTuple):
    """What the call is about: numbers, as in flash_bwd's arguments."""

    scale: Any
    heads: Any
    group: Any
    n_q: Any
    n_k: Any
    tiles: Any
    items: Any
    align: Any


class Memory(NamedTuple):
    """Shared memory, and the barriers that tell when its buffers are full and empty."""

    ks: Any  # K and V of a block, a buffer a consumer
    vs: Any
    qs: Any  # tiles of queries, with their maxima and the base-2 logs of their sums
    maxima: Any
    sums: Any
    dos: Any  # and of dO, with their delta
    deltas: Any
    kept: Any  # delta, by slot
    slots: Any  # for a tile of queries each: O, then dQ
    dss: Any  # the consumers' messages: dS^T, dV, dK
    kv_full: Any
    kv_empty: Any
    q_full: Any
    q_empty: Any
    do_full: Any
    do_empty: Any
    ds_full: Any
    ds_empty: Any
    cut: Any  # for what the producer itself waits for


@gluon.jit
def place(item, F, work):
    """(batch, key head, Scorer) of item number `item`."""
    seq = sequence.of_batch(F, item // (work.heads // work.group), 0, work.n_q, work.n_k)
    h_k = item % (work.heads // work.group)
    C: gl.constexpr = Static(LINEAR=True)
    return seq.b, h_k, score.prepare(F, seq, h_k * work.group, work.scale, work.align * (seq.n_k - work.n_q), C)


@gluon.jit
def tiles_of(block, scorer, F, work, left, right, BLOCK_M: gl.constexpr, KEYS: gl.constexpr):
    """The tiles of queries that a block of KEYS keys goes through: (first, full_begin, full_end, last); those of [full_begin,
    full_end) are whole and seen by all of its keys. first and last never fall from a block to the next, and no tile is left
    out: queries that see no key come with the first block, or with the last that has keys. For blocks behind that one first =
    last = tiles."""
    start_n = block * KEYS
    end_n = start_n + KEYS
    lo, full_lo, full_hi, hi = band.query_range(
        start_n,
        gl.minimum(end_n, scorer.n_k),
        gl.where(start_n < scorer.n_k, work.n_q, 0),
        scorer.shift,
        left,
        right,
        F,
        BLOCK_M,
    )
    seen_lo, _, _, seen_hi = band.key_range(0, work.n_q, scorer.n_k, scorer.shift, left, right, F, KEYS)
    final = gl.maximum(scorer.n_k - 1, 0) // KEYS
    first = gl.where(block == 0, 0, gl.where(block > final, work.tiles, gl.minimum(lo // BLOCK_M, work.tiles)))
    last = gl.where(block >= final, work.tiles, gl.maximum(gl.cdiv(gl.maximum(hi, 0), BLOCK_M), first))
    full_begin = gl.minimum(gl.maximum(gl.cdiv(full_lo, BLOCK_M), first), last)
    full_end = gl.minimum(gl.maximum(full_hi // BLOCK_M, full_begin), last)
    # Scores of keys that are not there are 0, and their weights may overflow: they have to be masked too.
    return first, full_begin, gl.where((start_n >= seen_lo) & (end_n <= seen_hi), full_end, full_begin), last


@gluon.jit
def sent(count, blocks):
    """Messages of a consumer to the gatherer from `count` tiles, dS^T of each, and `blocks` blocks, dV and dK of each."""
    return count + 2 * blocks
