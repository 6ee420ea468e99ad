"""Forward for Hopper: a producer fetches tiles by TMA, each of one to three consumer warpgroups owns BLOCK_M = 64 queries.

A consumer issues S_j = Q K_j^T and O += P_{j-1} V_{j-1} together and computes the softmax of S_j under the second product. Two
consumers can take turns (PINGPONG), so that one multiplies while the other exponentiates (Shah et al., FlashAttention-3, 2024).
Programs are persistent: each goes through items (a tile of queries of a head) until none is left, and the producer fetches the
next item's tiles while consumers finish the last. Which keys a query sees, and what happens between the product and the
softmax, is as in the portable kernels.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .. import band, score, sequence, softmax
from .attend import Item, Outputs, allocate, attend, fetch, finish
from .loads import load
from .parts import accumulator, barriers, begin_turns, buffers, end_turns
from .work import Static, Work

# Changing these numbers never recompiles.
RUN_TIME = ["stride_o", "batch", "heads", "group", "n_q", "n_k", "tiles", "items", "align", "left", "right"]


class Queries(NamedTuple):
    """Buffers of Q and O, one of each a consumer, and the barriers that tell when those of Q are full and empty."""

    qs: Any
    os: Any
    full: Any
    empty: Any


@gluon.jit
def _place(index, count, work, F, C: gl.constexpr, CONSUMER: gl.constexpr):
    """A consumer's part of item number `index`, before which this program had `count` tiles of keys. Where later queries see
    more keys, those of all heads come first, so that the shortest items come last."""
    ROWS: gl.constexpr = C.BLOCK_M * C.CONSUMERS
    heads, batch, tiles, n_q, n_k = work.heads, work.batch, work.tiles, work.n_q, work.n_k
    if work.right is not None:
        sets = work.items // tiles
        seq, h, start_m = sequence.query_tile(F, tiles - 1 - index // sets, index % sets, heads, batch, n_q, n_k, ROWS)
    else:
        seq, h, start_m = sequence.locate_queries(F, index, tiles, heads, batch, n_q, n_k, ROWS)
    shift = work.align * (seq.n_k - seq.n_q)
    scorer = score.prepare(F, seq, h, score.scale_of(F, work.scale), shift, C)
    end_m = gl.minimum(start_m + ROWS, seq.n_q)
    keys = band.key_range(start_m, end_m, scorer.n_k, shift, work.left, work.right, F, C.BLOCK_N)
    first = band.first_tile(keys[0], F, C.BLOCK_N)
    n_tiles = gl.cdiv(gl.maximum(keys[3] - first, 0), C.BLOCK_N)
    return Item(seq, h, seq.b * heads + h, start_m + CONSUMER * C.BLOCK_M, scorer, keys, first, n_tiles, count, True)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, queries, memory, work, F, C: gl.constexpr):
    """For each item fetch Q, then K and V of every tile of the keys it needs, as soon as their buffers are empty."""
    number, cuts, count = 0, 0, 0  # items, tiles with rows zeroed, and tiles so far
    for index in range(gl.program_id(0), work.items, gl.num_programs(0)):
        item = _place(index, count, work, F, C, 0)
        lo, _full_lo, _full_hi, hi = item.keys
        for c in gl.static_range(C.CONSUMERS):
            at = [item.seq.at, item.h, item.seq.q_row + item.start_m + c * C.BLOCK_M, 0]
            mbarrier.wait(queries.empty.index(c), (number & 1) ^ 1)
            load((q_desc,), at, queries.full.index(c), (queries.qs.index(c),))
        for start_n in range(item.first, hi, C.BLOCK_N):
            cuts = fetch(k_desc, v_desc, memory, item.seq, item.h // work.group, start_n, lo, hi, work.n_k, count, cuts, C)
            count += 1
        number += 1


@gluon.jit
def _consume(outputs, queries, memory, work, F, C: gl.constexpr, CONSUMER: gl.constexpr):
    """O and STATS of 64 queries of every item."""
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(C.BLOCK_N))
    O_IN_Q: gl.constexpr = C.BLOCK_D > 128
    number, count = 0, 0  # items and tiles of keys so far
    begin_turns(CONSUMER, C.PINGPONG)
    for index in range(gl.program_id(0), work.items, gl.num_programs(0)):
        item = _place(index, count, work, F, C, CONSUMER)
        acc = gl.zeros([C.BLOCK_M, C.BLOCK_D], gl.float32, accumulator(C.BLOCK_D))
        m_i, l_i = softmax.start(gl.zeros([C.BLOCK_M], gl.float32, ROWS), F.sinks, item.h, item.seq.real)
        mbarrier.wait(queries.full.index(CONSUMER), number & 1)
        if item.n_tiles > 0:
            q = queries.qs.index(CONSUMER).reshape([C.BLOCK_M, C.BLOCK_D])
            acc, m_i, l_i = attend(q, memory, acc, m_i, l_i, item, work, F, C, CONSUMER)
        if not O_IN_Q:
            mbarrier.arrive(queries.empty.index(CONSUMER), count=1)
        finish(acc, m_i, l_i, outputs, queries.os.index(CONSUMER), item, work, F, C)
        if O_IN_Q:
            tma.store_wait(0)
            mbarrier.arrive(queries.empty.index(CONSUMER), count=1)
        count += item.n_tiles
        number += 1
    end_turns(CONSUMER, C.PINGPONG)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_fwd(
    q_desc, k_desc, v_desc, o_desc, O, STATS, F, stride_o, batch, heads, group, n_q, n_k, tiles, items, scale, align, left,
    right, MOD: gl.constexpr, LINEAR: gl.constexpr, MASK_VEC: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PINGPONG: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, which share `items` = batch * heads * tiles; tiles = ceil(n_q / (CONSUMERS * BLOCK_M)).
    Packed: heads * tiles, tiles as in sequence.py.

    Descriptors of Q and O (B, heads, n_q, HEAD_DIM) in blocks of (1, 1, BLOCK_M, BLOCK_D), of K and V (B, heads / group, n_k,
    HEAD_DIM) in blocks of (1, 1, BLOCK_N, BLOCK_D), HEAD_DIM <= BLOCK_D. O again, with its strides as in tile.py, VEC 8. STATS
    (B, heads, 2, n_q) fp32 contiguous (softmax.store_stats); F Features; scale > 0; n_q, n_k > 0. num_warps is 4, those of the
    producer.
    """
    gl.static_assert(STAGES >= 2, "K of the next tile is waited for before V of this one is free")
    gl.static_assert(CONSUMERS == 2 or not PINGPONG, "two consumers take turns")
    gl.static_assert(CONSUMERS == 1 or (F.mask is None and F.bias is None), "a consumer zeroes what its queries don't see in V")
    C: gl.constexpr = Static(MOD=MOD, LINEAR=LINEAR, MASK_VEC=MASK_VEC, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M,
                             BLOCK_N=BLOCK_N, STAGES=STAGES, CONSUMERS=CONSUMERS, PINGPONG=PINGPONG)  # fmt: skip
    qs = buffers(q_desc, CONSUMERS)
    os = qs
    if BLOCK_D <= 128:  # else O leaves through the memory of Q, which is free again only then
        os = buffers(o_desc, CONSUMERS)
    memory = allocate(k_desc, v_desc, C)
    queries = Queries(qs, os, barriers(CONSUMERS, 1), barriers(CONSUMERS, 1))
    fence_async_shared()  # for the barriers
    outputs = Outputs(o_desc, O, stride_o, STATS)
    work = Work(scale, batch, heads, group, n_q, n_k, tiles, items, align, left, right)
    gl.warp_specialize([
        (_produce, (q_desc, k_desc, v_desc, queries, memory, work, F, C)),
        (_consume, (outputs, queries, memory, work, F, C, 0)),
        (_consume, (outputs, queries, memory, work, F, C, 1)),
        (_consume, (outputs, queries, memory, work, F, C, 2)),
    ][:CONSUMERS + 1], [4] * CONSUMERS, [REGISTERS] * CONSUMERS)  # fmt: skip
