"""What the partitions of flash_bwd share: shared memory, and where in it and in the work they are."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import band, score, sequence
from .parts import reinterpret


class Memory(NamedTuple):
    """Shared memory, and the barriers that tell when its buffers are full and empty."""

    ks: Any  # K and V of a block, a buffer a consumer
    vs: Any
    qs: Any  # tiles of queries, with their maxima and the base-2 logs of their sums
    maxima: Any
    sums: Any
    dos: Any  # tiles of dO, with their delta
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


class Tile(NamedTuple):
    """A tile of queries, on its way through a block of keys."""

    b: Any
    h: Any
    start_m: Any  # first query
    number: Any  # of the tile, or of the consumers' message about it
    use: Any  # how many uses of slots came before
    fresh: Any  # no block of keys has met it before


@gluon.jit
def slot_of(memory, slot, C: gl.constexpr):
    """A slot as a tile of queries of 16-bit numbers, like those of memory.qs."""
    return reinterpret(memory.slots.index(slot), memory.qs.dtype, [1, 1, C.BLOCK_M, C.BLOCK_D], memory.qs.layout)


@gluon.jit
def place(index, work, F, C: gl.constexpr):
    """(batch, key head, Scorer) of item number `index`."""
    seq = sequence.of_batch(F, index // (work.heads // work.group), 0, work.n_q, work.n_k)
    h_k = index % (work.heads // work.group)
    return seq.b, h_k, score.prepare(F, seq, h_k * work.group, work.scale, work.align * (seq.n_k - work.n_q), C)


@gluon.jit
def tiles_of(block, scorer, work, F, C: gl.constexpr):
    """The tiles of queries that a block of 2 * BLOCK_N keys goes through: (first, begin, end, last). Those of [begin, end) are
    whole and seen by all of its keys.

    first and last never fall from a block to the next, and no tile is left out: queries that see no key come with the first
    block, or with the last that has keys. Blocks behind that one have first = last = work.tiles.
    """
    KEYS: gl.constexpr = 2 * C.BLOCK_N
    start_n = block * KEYS
    end_n = start_n + KEYS
    n_k, shift, left, right = scorer.n_k, scorer.shift, work.left, work.right
    n_q = gl.where(start_n < n_k, work.n_q, 0)
    lo, full_lo, full_hi, hi = band.query_range(start_n, gl.minimum(end_n, n_k), n_q, shift, left, right, F, C.BLOCK_M)
    seen_lo, _, _, seen_hi = band.key_range(0, work.n_q, n_k, shift, left, right, F, KEYS)
    final = gl.maximum(n_k - 1, 0) // KEYS
    first = gl.where(block == 0, 0, gl.where(block > final, work.tiles, gl.minimum(lo // C.BLOCK_M, work.tiles)))
    last = gl.where(block >= final, work.tiles, gl.maximum(gl.cdiv(gl.maximum(hi, 0), C.BLOCK_M), first))
    begin = gl.minimum(gl.maximum(gl.cdiv(full_lo, C.BLOCK_M), first), last)
    end = gl.minimum(gl.maximum(full_hi // C.BLOCK_M, begin), last)
    # Scores of keys that do not exist are 0, and their weights may overflow: such blocks have to be masked too.
    return first, begin, gl.where((start_n >= seen_lo) & (end_n <= seen_hi), end, begin), last


@gluon.jit
def sent(count, blocks):
    """Messages of a consumer to the gatherer from `count` tiles, dS^T of each, and `blocks` blocks, dV and dK of each."""
    return count + 2 * blocks
