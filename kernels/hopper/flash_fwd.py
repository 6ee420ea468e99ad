"""Forward for Hopper: a producer fetches tiles by TMA, each of one to three consumer warpgroups owns BLOCK_M = 64 queries.

A consumer issues S_j = Q K_j^T and O += P_{j-1} V_{j-1} together and computes the softmax of S_j under the second product; two
consumers can take turns (PINGPONG), so that one multiplies while the other exponentiates (Shah et al., FlashAttention-3, 2024).
Programs are persistent: one goes through items (a tile of queries of a head) until none is left, and the producer is ahead with
the next one's tiles while consumers finish the last. Which keys a query sees, and what stands between the product and the
softmax, is as in the portable kernels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from .. import band, score, sequence, softmax, tile
from .parts import (
    accumulator,
    barriers,
    begin_turns,
    end_turns,
    give_turn,
    hide_rows,
    stage_of,
    survivors,
    take_turn,
    tma_load,
    tma_store,
    zero_rows,
)

# Changing these numbers never recompiles.
RUN_TIME = ["stride_o", "batch", "heads", "group", "n_q", "n_k", "tiles", "items", "align", "LEFT", "RIGHT"]


@gluon.jit
def _place(
    item, F, work, LEFT, RIGHT, LINEAR: gl.constexpr, MASK_VEC: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """Where item number `item` is, and what it depends on: (sequence, head, first query, Scorer, first key of its first tile,
    the keys it needs). Where later queries see more keys, those of all heads come first: the shortest items fill the end."""
    scale, batch, heads, _group, n_q, n_k, tiles, items, align = work
    if RIGHT is not None:
        sets = items // tiles
        seq, h, start_m = sequence.query_tile(F, tiles - 1 - item // sets, item % sets, heads, batch, n_q, n_k, ROWS)
    else:
        seq, h, start_m = sequence.locate_queries(F, item, tiles, heads, batch, n_q, n_k, ROWS)
    shift = align * (seq.n_k - seq.n_q)
    S = score.prepare(F, seq, h, score.scale_of(F, scale), shift, LINEAR, MASK_VEC)
    end_m = gl.minimum(start_m + ROWS, seq.n_q)
    keys = band.key_range(start_m, end_m, S.n_k, shift, LEFT, RIGHT, F, BLOCK_N)
    return seq, h, start_m, S, band.first_tile(keys[0], F, BLOCK_N), keys


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, memory, v_cut, work, F, LEFT, RIGHT, LINEAR: gl.constexpr, MASK_VEC: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """For each item fetch Q, then K and V of every tile of [lo, hi), as their buffers fall free. Rows beyond a tensor arrive as
    zeros; keys of the first and last tile that are there, but outside of [lo, hi), are zeroed in V."""
    qs, ks, vs, _os, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    _scale, _batch, _heads, group, _n_q, n_k, _tiles, items, _align = work
    number, cuts, count = 0, 0, 0  # of items, of tiles cut short, of tiles so far
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        seq, h, start_m, _S, first, keys = _place(item, F, work, LEFT, RIGHT, LINEAR, MASK_VEC, BLOCK_M * CONSUMERS, BLOCK_N)
        lo, _full_lo, _full_hi, hi = keys
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(c), (number & 1) ^ 1)
            mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
            tma_load(q_desc, [seq.at, h, seq.q_row + start_m + c * BLOCK_M, 0], q_full.index(c), qs.index(c))
        h_kv = h // group
        for start_n in range(first, hi, BLOCK_N):
            stage, phase = stage_of(count, STAGES)
            row = seq.k_row + start_n
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [seq.at, h_kv, row, 0], k_full.index(stage), ks.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            if (start_n < lo) | (gl.minimum(row + BLOCK_N, n_k) > seq.k_row + hi):
                mbarrier.expect(v_cut, v_desc.block_type.nbytes)
                tma_load(v_desc, [seq.at, h_kv, row, 0], v_cut, vs.index(stage))
                mbarrier.wait(v_cut, cuts & 1)
                zero_rows(vs.index(stage).reshape([BLOCK_N, D]), lo - start_n, hi - start_n, BLOCK_N)
                fence_async_shared()
                mbarrier.arrive(v_full.index(stage), count=1)
                cuts += 1
            else:
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, [seq.at, h_kv, row, 0], v_full.index(stage), vs.index(stage))
            count += 1
        number += 1


@gluon.jit
def _softmax(
    s, m_i, l_i, v, v_full, phase, bh, start_m, start_n, F, S, LEFT, RIGHT, MOD: gl.constexpr, LINEAR: gl.constexpr,
    MASK_VEC: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Take in products s [BLOCK_M, BLOCK_N] as softmax.step does. With a mask: where it hides a key of the tile from all
    queries, its row of v is zeroed, as soon as it is there."""
    S_LAYOUT: gl.constexpr = s.type.layout
    offs_m = start_m + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, S_LAYOUT))
    offs_n = start_n + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S_LAYOUT))
    s, keep, _slope = score.logits(
        s, offs_m[:, None], offs_n[None, :], start_m, start_n, F, S, LEFT, RIGHT,
        MOD, None, LINEAR, MASK_VEC, MASKED, MASKED)  # fmt: skip
    if F.mask is not None or F.bias is not None:
        seen = gl.max(keep.to(gl.int32), 0)
        if gl.min(seen, 0) == 0:
            mbarrier.wait(v_full, phase)
            hide_rows(v, seen)
            fence_async_shared()
    p, alpha, m_i, l_i = softmax.step(gl.where(keep, s, float("-inf")), m_i, l_i, S, LINEAR)
    if F.dropout is not None:
        p = gl.where(survivors(F.dropout, bh, start_m, start_n, p), p, 0.0)
    return p, alpha, m_i, l_i


@gluon.jit
def _step(
    i, count, q, memory, acc, p, m_i, l_i, bh, start_m, first, n_tiles, F, S, LEFT, RIGHT, MOD: gl.constexpr,
    LINEAR: gl.constexpr, MASK_VEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The scores and softmax of an item's tile i, before which `count` tiles came, and the product of the tile before it,
    whose P is p."""
    _, ks, vs, _os, _q_full, _q_empty, k_full, k_empty, v_full, v_empty = memory
    stage, now = stage_of(count + i, STAGES)
    before, phase = stage_of(count + i - 1, STAGES)
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    take_turn(CONSUMER, PINGPONG)
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    k = ks.index(stage).reshape([BLOCK_N, D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, D] @ [D, BLOCK_N]
    mbarrier.wait(v_full.index(before), phase)
    v = vs.index(before).reshape([BLOCK_N, D])
    acc = warpgroup_mma(p, v, acc, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, D]
    give_turn(CONSUMER, PINGPONG)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    v = vs.index(stage).reshape([BLOCK_N, D])
    x, alpha, m_i, l_i = _softmax(
        s, m_i, l_i, v, v_full.index(stage), now, bh, start_m, first + i * BLOCK_N, F, S, LEFT, RIGHT,
        MOD, LINEAR, MASK_VEC, MASKED)  # fmt: skip
    following = gl.convert_layout(x.to(v.dtype), p.type.layout)
    # A real branch: without one ptxas moves the wait below above the exponentials, and nothing overlaps.
    stage, phase = stage_of(count + i + 1, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=i + 1 < n_tiles)
    acc, following = warpgroup_mma_wait(0, deps=(acc, following))
    mbarrier.arrive(v_empty.index(before), count=1)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    return acc * alpha[:, None], following, m_i, l_i


@gluon.jit
def _attend(
    q, memory, acc, m_i, l_i, count, n_tiles, bh, start_m, first, keys, F, S, LEFT, RIGHT, MOD: gl.constexpr,
    LINEAR: gl.constexpr, MASK_VEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """Take an item's n_tiles > 0 tiles of keys, before which `count` tiles came, into (acc, m_i, l_i)."""
    _, ks, vs, _os, _q_full, _q_empty, k_full, k_empty, v_full, v_empty = memory
    _lo, full_lo, full_hi, _hi = keys
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    stage, phase = stage_of(count, STAGES)
    mbarrier.wait(k_full.index(stage), phase)
    take_turn(CONSUMER, PINGPONG)
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    k = ks.index(stage).reshape([BLOCK_N, D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, D] @ [D, BLOCK_N]
    give_turn(CONSUMER, PINGPONG)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    v = vs.index(stage).reshape([BLOCK_N, D])
    x, _alpha, m_i, l_i = _softmax(
        s, m_i, l_i, v, v_full.index(stage), phase, bh, start_m, first, F, S, LEFT, RIGHT,
        MOD, LINEAR, MASK_VEC, True)  # fmt: skip
    p = gl.convert_layout(x.to(vs.dtype), P_LAYOUT)
    stage, phase = stage_of(count + 1, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=n_tiles > 1)
    left = gl.minimum((full_lo - first) // BLOCK_N, n_tiles)
    right = gl.minimum(gl.maximum((full_hi - first) // BLOCK_N, left), n_tiles)
    if LEFT is not None:
        for i in range(1, left):
            acc, p, m_i, l_i = _step(
                i, count, q, memory, acc, p, m_i, l_i, bh, start_m, first, n_tiles, F, S, LEFT, RIGHT, MOD, LINEAR,
                MASK_VEC, BLOCK_M, BLOCK_N, D, STAGES, CONSUMER, PINGPONG, True)  # fmt: skip
    for i in range(gl.maximum(left, 1), right):
        acc, p, m_i, l_i = _step(
            i, count, q, memory, acc, p, m_i, l_i, bh, start_m, first, n_tiles, F, S, LEFT, RIGHT, MOD, LINEAR,
            MASK_VEC, BLOCK_M, BLOCK_N, D, STAGES, CONSUMER, PINGPONG, False)  # fmt: skip
    for i in range(gl.maximum(right, 1), n_tiles):
        acc, p, m_i, l_i = _step(
            i, count, q, memory, acc, p, m_i, l_i, bh, start_m, first, n_tiles, F, S, LEFT, RIGHT, MOD, LINEAR,
            MASK_VEC, BLOCK_M, BLOCK_N, D, STAGES, CONSUMER, PINGPONG, True)  # fmt: skip
    stage, phase = stage_of(count + n_tiles - 1, STAGES)
    mbarrier.wait(v_full.index(stage), phase)
    v = vs.index(stage).reshape([BLOCK_N, D])
    acc = warpgroup_mma(p, v, acc, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, D]
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    return acc, m_i, l_i


@gluon.jit
def _write(o, o_desc, O, stride_o, buffer, seq, h, start_m, F, DIM: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """o [BLOCK_M, D] to its rows of O: by TMA, or where they end inside of a tensor, row by row."""
    if F.cu_q is None:
        buffer.reshape([BLOCK_M, D]).store(o)
        fence_async_shared()
        tma_store(o_desc, [seq.at, h, start_m, 0], buffer)
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
        o = gl.convert_layout(o, LAYOUT)
        rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
        columns = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
        there = (start_m + rows < seq.n_q)[:, None] & (columns < DIM)[None, :]
        O = tile.head(O, stride_o, seq.at, h, seq.q_row + start_m, 8)
        gl.store(O + (rows[:, None] * tile.stride_of(stride_o, 2, 8).to(gl.int32) + columns[None, :]), o, mask=there)


@gluon.jit
def _consume(
    o_desc, O, LSE, stride_o, memory, work, F, LEFT, RIGHT, MOD: gl.constexpr, LINEAR: gl.constexpr, MASK_VEC: gl.constexpr,
    DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """O and LSE of 64 queries of every item."""
    qs, _ks, _vs, os, q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty = memory
    _scale, _batch, heads, _group, n_q, _n_k, _tiles, items, _align = work
    O_LAYOUT: gl.constexpr = accumulator(D)
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    O_IN_Q: gl.constexpr = D > 128
    number, count = 0, 0  # of items, of tiles so far
    begin_turns(CONSUMER, PINGPONG)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        seq, h, start_m, S, first, keys = _place(item, F, work, LEFT, RIGHT, LINEAR, MASK_VEC, BLOCK_M * CONSUMERS, BLOCK_N)
        start_m += CONSUMER * BLOCK_M
        bh = seq.b * heads + h
        n_tiles = gl.cdiv(gl.maximum(keys[3] - first, 0), BLOCK_N)
        acc = gl.zeros([BLOCK_M, D], gl.float32, O_LAYOUT)
        m_i, l_i = softmax.start(gl.zeros([BLOCK_M], gl.float32, ROWS), F.sinks, h, seq.real)
        mbarrier.wait(q_full.index(CONSUMER), number & 1)
        if n_tiles > 0:
            acc, m_i, l_i = _attend(
                qs.index(CONSUMER).reshape([BLOCK_M, D]), memory, acc, m_i, l_i, count, n_tiles, bh, start_m, first, keys,
                F, S, LEFT, RIGHT, MOD, LINEAR, MASK_VEC, BLOCK_M, BLOCK_N, D, STAGES, CONSUMER, PINGPONG)  # fmt: skip
        if not O_IN_Q:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        l_safe = gl.where(l_i == 0.0, 1.0, l_i)
        inverse = gl.convert_layout(1.0 / l_safe, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
        if F.dropout is not None:
            inverse *= F.dropout.factor
        tma.store_wait(0)  # the last item's O has left the buffer
        _write(
            (acc * inverse[:, None]).to(os.dtype), o_desc, O, stride_o, os.index(CONSUMER), seq, h, start_m, F, DIM, BLOCK_M, D
        )
        row = (seq.at * heads + h).to(gl.int64) * n_q + seq.q_row
        offs_m = start_m + gl.arange(0, BLOCK_M, layout=ROWS)
        lse = m_i * (S.c * softmax.LN2) + gl.log2(l_safe) * softmax.LN2
        gl.store(LSE + row + offs_m, lse, mask=offs_m < seq.n_q)
        if O_IN_Q:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        count += n_tiles
        number += 1
    end_turns(CONSUMER, PINGPONG)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_fwd(
    q_desc, k_desc, v_desc, o_desc, O, LSE, F, stride_o, batch, heads, group, n_q, n_k, tiles, items, scale, align, LEFT, RIGHT,
    MOD: gl.constexpr, LINEAR: gl.constexpr, MASK_VEC: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PINGPONG: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, which share `items` = batch * heads * tiles; tiles = ceil(n_q / (CONSUMERS * BLOCK_M)).
    Packed: heads * tiles, tiles as in sequence.py.

    Descriptors of Q and O (B, heads, n_q, DIM) in blocks of (1, 1, BLOCK_M, D), of K and V (B, heads / group, n_k, DIM) in
    blocks of (1, 1, BLOCK_N, D), DIM <= D. O again, with its strides as in tile.py, VEC 8. LSE (B, heads, n_q) fp32 contiguous;
    F Features; scale > 0; n_q, n_k > 0. For 4 warps: the producer.
    """
    gl.static_assert(STAGES >= 2, "K of the next tile is waited for before V of this one is free")
    gl.static_assert(CONSUMERS == 2 or not PINGPONG, "two consumers take turns")
    gl.static_assert(CONSUMERS == 1 or (F.mask is None and F.bias is None), "a consumer zeroes what its queries don't see in V")
    qs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, D], q_desc.layout)
    os = qs
    if D <= 128:  # else it goes through the memory of Q, which is free again only then
        os = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, D], o_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full, k_full, v_full = barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_empty, k_empty, v_empty = barriers(CONSUMERS, 1), barriers(STAGES, CONSUMERS), barriers(STAGES, CONSUMERS)
    v_cut = barriers(1, 1).index(0)
    fence_async_shared()  # for the barriers
    memory = (qs, ks, vs, os, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    work = (scale, batch, heads, group, n_q, n_k, tiles, items, align)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, memory, v_cut, work, F, LEFT, RIGHT, LINEAR, MASK_VEC,
                        BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS)),
            (_consume, (o_desc, O, LSE, stride_o, memory, work, F, LEFT, RIGHT, MOD, LINEAR, MASK_VEC,
                        DIM, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, 0, PINGPONG)),
        ], [4], [REGISTERS])  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, memory, v_cut, work, F, LEFT, RIGHT, LINEAR, MASK_VEC,
                        BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS)),
            (_consume, (o_desc, O, LSE, stride_o, memory, work, F, LEFT, RIGHT, MOD, LINEAR, MASK_VEC,
                        DIM, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, 0, PINGPONG)),
            (_consume, (o_desc, O, LSE, stride_o, memory, work, F, LEFT, RIGHT, MOD, LINEAR, MASK_VEC,
                        DIM, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, 1, PINGPONG)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, memory, v_cut, work, F, LEFT, RIGHT, LINEAR, MASK_VEC,
                        BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS)),
            (_consume, (o_desc, O, LSE, stride_o, memory, work, F, LEFT, RIGHT, MOD, LINEAR, MASK_VEC,
                        DIM, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, 0, PINGPONG)),
            (_consume, (o_desc, O, LSE, stride_o, memory, work, F, LEFT, RIGHT, MOD, LINEAR, MASK_VEC,
                        DIM, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, 1, PINGPONG)),
            (_consume, (o_desc, O, LSE, stride_o, memory, work, F, LEFT, RIGHT, MOD, LINEAR, MASK_VEC,
                        DIM, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, 2, PINGPONG)),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
