"""Forward for Hopper: a producer fetches tiles by TMA, each of one to three consumer warpgroups owns BLOCK_M = 64 queries.

A consumer issues S_j = Q K_j^T and O += P_{j-1} V_{j-1} together and computes the softmax of S_j under the second product; two
consumers can take turns (PINGPONG), so that one multiplies while the other exponentiates (Shah et al., FlashAttention-3, 2024).
Programs are persistent: one goes through items (a tile of queries of a head) until none is left, and the producer is ahead with
the next one's tiles while consumers finish the last. Which keys a query sees, and what stands between the product and the
softmax, is as in the portable kernels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .. import band, score, sequence, softmax
from ..static import Static
from .attend import attend, fetch, finish
from .parts import accumulator, barriers, begin_turns, end_turns, tma_load

# Changing these numbers never recompiles.
RUN_TIME = ["stride_o", "batch", "heads", "group", "n_q", "n_k", "tiles", "items", "align", "left", "right"]


@gluon.jit
def _place(
    item, F, work, left, right, LINEAR: gl.constexpr, MASK_VEC: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """Where item number `item` is, and what it depends on: (sequence, head, first query, Scorer, first key of its first tile,
    the keys it needs). Where later queries see more keys, those of all heads come first: the shortest items fill the end."""
    scale, batch, heads, _group, n_q, n_k, tiles, items, align = work
    if right is not None:
        sets = items // tiles
        seq, h, start_m = sequence.query_tile(F, tiles - 1 - item // sets, item % sets, heads, batch, n_q, n_k, ROWS)
    else:
        seq, h, start_m = sequence.locate_queries(F, item, tiles, heads, batch, n_q, n_k, ROWS)
    shift = align * (seq.n_k - seq.n_q)
    C: gl.constexpr = Static(LINEAR=LINEAR, MASK_VEC=MASK_VEC)
    scorer = score.prepare(F, seq, h, score.scale_of(F, scale), shift, C)
    end_m = gl.minimum(start_m + ROWS, seq.n_q)
    keys = band.key_range(start_m, end_m, scorer.n_k, shift, left, right, F, BLOCK_N)
    return seq, h, start_m, scorer, band.first_tile(keys[0], F, BLOCK_N), keys


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, queries, memory, v_cut, work, F, left, right, LINEAR: gl.constexpr, MASK_VEC: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """For each item fetch Q, then K and V of every tile of the keys it needs, as their buffers fall free."""
    qs, _os, q_full, q_empty = queries
    _scale, _batch, _heads, group, _n_q, n_k, _tiles, items, _align = work
    number, cuts, count = 0, 0, 0  # of items, of tiles cut short, of tiles so far
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        seq, h, start_m, _S, first, keys = _place(item, F, work, left, right, LINEAR, MASK_VEC, BLOCK_M * CONSUMERS, BLOCK_N)
        lo, _full_lo, _full_hi, hi = keys
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(c), (number & 1) ^ 1)
            mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
            tma_load(q_desc, [seq.at, h, seq.q_row + start_m + c * BLOCK_M, 0], q_full.index(c), qs.index(c))
        for start_n in range(first, hi, BLOCK_N):
            cuts = fetch(
                k_desc, v_desc, memory, v_cut, seq, h // group, start_n, lo, hi, n_k, count, cuts, BLOCK_N, BLOCK_D, STAGES
            )
            count += 1
        number += 1


@gluon.jit
def _consume(
    o_desc, O, STATS, stride_o, queries, memory, work, F, left, right, MOD: gl.constexpr, LINEAR: gl.constexpr,
    MASK_VEC: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """O and STATS of 64 queries of every item."""
    qs, os, q_full, q_empty = queries
    _scale, _batch, heads, _group, n_q, _n_k, _tiles, items, _align = work
    O_LAYOUT: gl.constexpr = accumulator(BLOCK_D)
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    O_IN_Q: gl.constexpr = BLOCK_D > 128
    number, count = 0, 0  # of items, of tiles so far
    begin_turns(CONSUMER, PINGPONG)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        seq, h, start_m, scorer, first, keys = _place(
            item, F, work, left, right, LINEAR, MASK_VEC, BLOCK_M * CONSUMERS, BLOCK_N
        )
        start_m += CONSUMER * BLOCK_M
        bh = seq.b * heads + h
        n_tiles = gl.cdiv(gl.maximum(keys[3] - first, 0), BLOCK_N)
        acc = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, O_LAYOUT)
        m_i, l_i = softmax.start(gl.zeros([BLOCK_M], gl.float32, ROWS), F.sinks, h, seq.real)
        mbarrier.wait(q_full.index(CONSUMER), number & 1)
        if n_tiles > 0:
            acc, m_i, l_i = attend(
                qs.index(CONSUMER).reshape([BLOCK_M, BLOCK_D]), memory, acc, m_i, l_i, count, n_tiles, True, bh, start_m, first,
                keys, F, scorer, left, right, MOD, LINEAR, MASK_VEC, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER,
                PINGPONG)  # fmt: skip
        if not O_IN_Q:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        finish(
            acc,
            m_i,
            l_i,
            o_desc,
            O,
            STATS,
            stride_o,
            os.index(CONSUMER),
            seq,
            h,
            heads,
            start_m,
            n_q,
            F,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_D,
        )
        if O_IN_Q:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        count += n_tiles
        number += 1
    end_turns(CONSUMER, PINGPONG)
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
    (B, heads, 2, n_q) fp32 contiguous (softmax.store_stats); F Features; scale > 0; n_q, n_k > 0. For 4 warps: the producer.
    """
    gl.static_assert(STAGES >= 2, "K of the next tile is waited for before V of this one is free")
    gl.static_assert(CONSUMERS == 2 or not PINGPONG, "two consumers take turns")
    gl.static_assert(CONSUMERS == 1 or (F.mask is None and F.bias is None), "a consumer zeroes what its queries don't see in V")
    qs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    os = qs
    if BLOCK_D <= 128:  # else it goes through the memory of Q, which is free again only then
        os = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, BLOCK_D], o_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    q_full, k_full, v_full = barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_empty, k_empty, v_empty = barriers(CONSUMERS, 1), barriers(STAGES, CONSUMERS), barriers(STAGES, CONSUMERS)
    v_cut = barriers(1, 1).index(0)
    fence_async_shared()  # for the barriers
    queries = (qs, os, q_full, q_empty)
    memory = (ks, vs, k_full, k_empty, v_full, v_empty)
    work = (scale, batch, heads, group, n_q, n_k, tiles, items, align)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, queries, memory, v_cut, work, F, left, right, LINEAR, MASK_VEC,
                        BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS)),
            (_consume, (o_desc, O, STATS, stride_o, queries, memory, work, F, left, right, MOD, LINEAR, MASK_VEC,
                        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 0, PINGPONG)),
        ], [4], [REGISTERS])  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, queries, memory, v_cut, work, F, left, right, LINEAR, MASK_VEC,
                        BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS)),
            (_consume, (o_desc, O, STATS, stride_o, queries, memory, work, F, left, right, MOD, LINEAR, MASK_VEC,
                        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 0, PINGPONG)),
            (_consume, (o_desc, O, STATS, stride_o, queries, memory, work, F, left, right, MOD, LINEAR, MASK_VEC,
                        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 1, PINGPONG)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, queries, memory, v_cut, work, F, left, right, LINEAR, MASK_VEC,
                        BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS)),
            (_consume, (o_desc, O, STATS, stride_o, queries, memory, work, F, left, right, MOD, LINEAR, MASK_VEC,
                        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 0, PINGPONG)),
            (_consume, (o_desc, O, STATS, stride_o, queries, memory, work, F, left, right, MOD, LINEAR, MASK_VEC,
                        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 1, PINGPONG)),
            (_consume, (o_desc, O, STATS, stride_o, queries, memory, work, F, left, right, MOD, LINEAR, MASK_VEC,
                        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 2, PINGPONG)),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
