"""The whole backward for Hopper in one launch, where a head has few queries. No atomics: the same inputs give the same bits.

A program takes a key head at a time, with the queries of its group, and its keys in blocks of two times BLOCK_N = 64. A producer
fetches tiles by TMA and forms the delta of every tile of queries. Each of two consumer warpgroups owns BLOCK_N keys of a block,
holds the scores transposed and sums dK and dV as flash_bwd_dkdv does. But it also leaves every dS^T in shared memory, where a
gatherer, a warpgroup with K^T in registers, forms dQ^T += K^T dS^T: scores are computed once. From block to block dQ stays in
shared memory, in float32: every tile of queries has a slot there, in which first its O arrives, for delta, and through which in
the end dQ leaves. dV and dK leave through the buffers of dS^T. Programs are persistent, as in flash_fwd.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from .. import band, score, sequence, softmax
from .parts import accumulator, barriers, reinterpret, stage_of, tma_load, tma_store, zero_rows

# Changing these numbers never recompiles.
RUN_TIME = ["heads", "group", "n_q", "n_k", "tiles", "items", "align", "LEFT", "RIGHT"]


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
    qs: Any  # tiles of queries, with their lse
    lses: Any
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
def _place(item, F, work):
    """(batch, key head, Scorer) of item number `item`."""
    seq = sequence.of_batch(F, item // (work.heads // work.group), 0, work.n_q, work.n_k)
    h_k = item % (work.heads // work.group)
    return seq.b, h_k, score.prepare(F, seq, h_k * work.group, work.scale, work.align * (seq.n_k - work.n_q), True, 0)


@gluon.jit
def _tiles_of(block, S, F, work, LEFT, RIGHT, BLOCK_M: gl.constexpr, KEYS: gl.constexpr):
    """The tiles of queries that a block of KEYS keys goes through: (first, left, right, last); those of [left, right) are whole
    and seen by all of its keys. first and last never fall from a block to the next, and no tile is left out: queries that see
    no key come with the first block, or with the last that has keys. For blocks behind that one first = last = tiles."""
    start_n = block * KEYS
    end_n = start_n + KEYS
    lo, full_lo, full_hi, hi = band.query_range(
        start_n, gl.minimum(end_n, S.n_k), gl.where(start_n < S.n_k, work.n_q, 0), S.shift, LEFT, RIGHT, F, BLOCK_M
    )
    seen_lo, _, _, seen_hi = band.key_range(0, work.n_q, S.n_k, S.shift, LEFT, RIGHT, F, KEYS)
    final = gl.maximum(S.n_k - 1, 0) // KEYS
    first = gl.where(block == 0, 0, gl.where(block > final, work.tiles, gl.minimum(lo // BLOCK_M, work.tiles)))
    last = gl.where(block >= final, work.tiles, gl.maximum(gl.cdiv(gl.maximum(hi, 0), BLOCK_M), first))
    left = gl.minimum(gl.maximum(gl.cdiv(full_lo, BLOCK_M), first), last)
    right = gl.minimum(gl.maximum(full_hi // BLOCK_M, left), last)
    # Scores of keys that are not there are 0, and their weights may overflow: they have to be masked too.
    return first, left, gl.where((start_n >= seen_lo) & (end_n <= seen_hi), right, left), last


@gluon.jit
def _slot(slots, i, like):
    """A slot as a tile of queries of 16-bit numbers, like those of qs."""
    return reinterpret(slots.index(i), like.dtype, like.shape, like.layout)


@gluon.jit
def _load_seen(desc, b, h, start, buffer, full, seen_lo, seen_hi, n, cut, cuts, ROWS: gl.constexpr, D: gl.constexpr):
    """A tile of rows from `start` on by TMA, which arrives at `full`; of its rows below n, those outside of [seen_lo, seen_hi) are
    zeroed first. Returns how many tiles came by `cut`."""
    if (start < seen_lo) | (gl.minimum(start + ROWS, n) > seen_hi):
        mbarrier.expect(cut, desc.block_type.nbytes)
        tma_load(desc, [b, h, start, 0], cut, buffer)
        mbarrier.wait(cut, cuts & 1)
        zero_rows(buffer.reshape([ROWS, D]), seen_lo - start, seen_hi - start, ROWS)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
        cuts += 1
    else:
        mbarrier.expect(full, desc.block_type.nbytes)
        tma_load(desc, [b, h, start, 0], full, buffer)
    return cuts


@gluon.jit
def _form_delta(o, do, DLSE, row, start_m, seen_lo, seen_hi, kept, F, BLOCK_M: gl.constexpr):
    """delta = rowsum(O * dO) - DLSE of a tile of queries, 0 where they see no key; 16 rows at a time, as a producer has few
    registers."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for first in gl.static_range(0, BLOCK_M, 16):
        delta = softmax.delta(o.slice(first, 16).load(LAYOUT), do.slice(first, 16).load(LAYOUT), F)
        offs_m = start_m + first + gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT))
        seen = (offs_m >= seen_lo) & (offs_m < seen_hi)
        if DLSE is not None:
            delta -= gl.load(DLSE + row + offs_m, mask=seen, other=0.0)
        kept.slice(first, 16).store(gl.where(seen, delta, 0.0))


@gluon.jit
def _fetch_queries(
    q_desc, o_desc, do_desc, LSE, DLSE, memory, count, use, fresh, b, h, start_m, seen_lo, seen_hi, cuts, F, work,
    BLOCK_M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Tile number `count` of Q and dO, with lse and delta, as buffers fall free. When it is `fresh`, its O arrives in its slot,
    of which this is use number `use`, and delta is formed, which is then kept for later blocks."""
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    stage, phase = stage_of(count, STAGES)
    row = (b * work.heads + h).to(gl.int64) * work.n_q
    lse = softmax.load_lse(LSE + row, start_m + gl.arange(0, BLOCK_M, layout=ROWS), seen_lo, seen_hi, True, True)
    mbarrier.wait(memory.q_empty.index(stage), phase ^ 1)
    cuts = _load_seen(
        q_desc, b, h, start_m, memory.qs.index(stage), memory.q_full.index(stage), seen_lo, seen_hi, work.n_q, memory.cut, cuts,
        BLOCK_M, D)  # fmt: skip
    memory.lses.index(stage).store(lse)
    mbarrier.arrive(memory.q_full.index(stage), count=1)
    stage, phase = stage_of(count, STAGES - 1)
    slot = use % TILES
    mbarrier.wait(memory.do_empty.index(stage), phase ^ 1)
    if fresh:
        o = _slot(memory.slots, slot, memory.qs.index(0))
        mbarrier.expect(memory.cut, 2 * q_desc.block_type.nbytes)
        tma_load(o_desc, [b, h, start_m, 0], memory.cut, o)
        tma_load(do_desc, [b, h, start_m, 0], memory.cut, memory.dos.index(stage))
        mbarrier.wait(memory.cut, cuts & 1)
        cuts += 1
        do = memory.dos.index(stage).reshape([BLOCK_M, D])
        _form_delta(o.reshape([BLOCK_M, D]), do, DLSE, row, start_m, seen_lo, seen_hi, memory.kept.index(slot), F, BLOCK_M)
        if (start_m < seen_lo) | (gl.minimum(start_m + BLOCK_M, work.n_q) > seen_hi):
            zero_rows(do, seen_lo - start_m, seen_hi - start_m, BLOCK_M)
            fence_async_shared()
        mbarrier.arrive(memory.do_full.index(stage), count=1)
    else:
        cuts = _load_seen(
            do_desc, b, h, start_m, memory.dos.index(stage), memory.do_full.index(stage), seen_lo, seen_hi, work.n_q, memory.cut,
            cuts, BLOCK_M, D)  # fmt: skip
    memory.deltas.index(stage).store(memory.kept.index(slot).load(ROWS))
    mbarrier.arrive(memory.do_full.index(stage), count=1)
    return cuts


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, o_desc, do_desc, LSE, DLSE, memory, work, F, LEFT, RIGHT, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """For every block of keys of every item, K and V as soon as the last ones are in registers; then its tiles of queries."""
    KEYS: gl.constexpr = 2 * BLOCK_N
    uses, blocks, count, cuts = 0, 0, 0, 0  # of slots, of blocks and of tiles of queries so far
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        b, h_k, S = _place(item, F, work)
        k_lo, _, _, k_hi = band.key_range(0, work.n_q, S.n_k, S.shift, LEFT, RIGHT, F, KEYS)
        q_lo, _, _, q_hi = band.query_range(0, S.n_k, gl.where(S.n_k > 0, work.n_q, 0), S.shift, LEFT, RIGHT, F, BLOCK_M)
        reached = 0
        for block in range(gl.cdiv(work.n_k, KEYS)):
            first, _, _, last = _tiles_of(block, S, F, work, LEFT, RIGHT, BLOCK_M, KEYS)
            mbarrier.wait(memory.kv_empty, (blocks & 1) ^ 1)
            for c in gl.static_range(2):
                start = block * KEYS + c * BLOCK_N
                cuts = _load_seen(
                    k_desc, b, h_k, start, memory.ks.index(c), memory.kv_full, k_lo, k_hi, work.n_k, memory.cut, cuts,
                    BLOCK_N, D)  # fmt: skip
                cuts = _load_seen(
                    v_desc, b, h_k, start, memory.vs.index(c), memory.kv_full, k_lo, k_hi, work.n_k, memory.cut, cuts,
                    BLOCK_N, D)  # fmt: skip
            blocks += 1
            for member in range(work.group):
                for i in range(first, last):
                    cuts = _fetch_queries(
                        q_desc, o_desc, do_desc, LSE, DLSE, memory, count, uses + member * work.tiles + i, i >= reached, b,
                        h_k * work.group + member, i * BLOCK_M, q_lo, q_hi, cuts, F, work, BLOCK_M, D, STAGES, TILES)  # fmt: skip
                    count += 1
            reached = gl.maximum(reached, last)
        uses += work.group * work.tiles


@gluon.jit
def _sent(count, blocks):
    """Messages of a consumer to the gatherer from `count` tiles, dS^T of each, and `blocks` blocks, dV and dK of each."""
    return count + 2 * blocks


@gluon.jit
def _send(x, memory, number, CONSUMER: gl.constexpr, RING: gl.constexpr, BLOCK_N: gl.constexpr):
    """Leave x [BLOCK_N, 64] to the gatherer, as a consumer's message number `number`."""
    place, phase = stage_of(number, RING)
    mbarrier.wait(memory.ds_empty.index(place), phase ^ 1)
    memory.dss.index(2 * place + CONSUMER).reshape([BLOCK_N, x.shape[1]]).store(x)
    fence_async_shared()
    mbarrier.arrive(memory.ds_full.index(place), count=1)


@gluon.jit
def _step(
    count, end, blocks, k, v, memory, dk, dv, ds, start_m, start_n, S, LEFT, RIGHT, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, CONSUMER: gl.constexpr,
    FIRST: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dS and dV of tile number `count`, queries from start_m on, and dK of the tile before it, whose dS^T is ds. Those of the block
    go to number `end`; before it came `blocks`."""
    stage, _ = stage_of(count, STAGES)
    before, _ = stage_of(count - 1, STAGES)
    do_stage, do_phase = stage_of(count, STAGES - 1)
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_M)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(D), k_width=2)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S_LAYOUT)
    q = memory.qs.index(stage).reshape([BLOCK_M, D])
    do = memory.dos.index(do_stage).reshape([BLOCK_M, D])
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_N, D] @ [D, BLOCK_M]
    lse = memory.lses.index(stage).load(COLUMNS)
    if FIRST:
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        dk = warpgroup_mma(
            ds, memory.qs.index(before).reshape([BLOCK_M, D]), dk, is_async=True
        )  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, D]
        s = warpgroup_mma_wait(1, deps=(s,))
    if MASKED:
        offs_m = start_m + gl.arange(0, BLOCK_M, layout=COLUMNS)
        offs_n = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT))
        s = gl.where(band.visible(offs_m[None, :], offs_n[:, None], S.n_k, S.shift, LEFT, RIGHT), s, float("-inf"))
    p = softmax.weights(s, lse[None, :], S, True)
    mbarrier.wait(memory.do_full.index(do_stage), do_phase)
    dp = zero - memory.deltas.index(do_stage).load(COLUMNS)[None, :]  # so that dP - delta comes out of the product
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, is_async=True)  # [BLOCK_N, D] @ [D, BLOCK_M]
    if not FIRST:
        dk, p = warpgroup_mma_wait(1, deps=(dk, p))
        mbarrier.arrive(memory.q_empty.index(before), count=1)
    pt = gl.convert_layout(p.to(do.dtype), A_LAYOUT)
    dv = warpgroup_mma(pt, do, dv, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, D]
    dp = warpgroup_mma_wait(1, deps=(dp,))
    following = gl.convert_layout((p * dp).to(q.dtype), A_LAYOUT)
    _send(following, memory, _sent(count, blocks), CONSUMER, RING, BLOCK_N)
    # A real branch: without one ptxas moves the wait below above dS, and nothing overlaps.
    ahead, phase_ahead = stage_of(count + 1, STAGES)
    mbarrier.wait(memory.q_full.index(ahead), phase_ahead, pred=count + 1 < end)
    dv, following = warpgroup_mma_wait(0, deps=(dv, following))
    mbarrier.arrive(memory.do_empty.index(do_stage), count=1)
    return dk, dv, following


@gluon.jit
def _sum(
    k, v, memory, group, count, blocks, tiles, start_n, dk, dv, S, LEFT, RIGHT, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dK and dV of a block's keys over its `tiles` of queries, at least one."""
    first, left, right, last = tiles
    stage, phase = stage_of(count, STAGES)
    mbarrier.wait(memory.q_full.index(stage), phase)
    each = last - first
    end = count + group * each
    ds = gl.zeros([BLOCK_N, BLOCK_M], memory.qs.dtype, gl.DotOperandLayout(operand_index=0, parent=accumulator(D), k_width=2))
    dk, dv, ds = _step(count, end, blocks, k, v, memory, dk, dv, ds, first * BLOCK_M, start_n, S, LEFT, RIGHT,
                       BLOCK_M, BLOCK_N, D, STAGES, RING, CONSUMER, True, True)  # fmt: skip
    for member in range(group):
        t = count + member * each - first
        begin = first + gl.maximum(1 - member, 0)
        if RIGHT is not None:
            for i in range(begin, left):
                dk, dv, ds = _step(t + i, end, blocks, k, v, memory, dk, dv, ds, i * BLOCK_M, start_n, S, LEFT, RIGHT,
                                   BLOCK_M, BLOCK_N, D, STAGES, RING, CONSUMER, False, True)  # fmt: skip
        for i in range(gl.maximum(left, begin), right):
            dk, dv, ds = _step(t + i, end, blocks, k, v, memory, dk, dv, ds, i * BLOCK_M, start_n, S, LEFT, RIGHT,
                               BLOCK_M, BLOCK_N, D, STAGES, RING, CONSUMER, False, False)  # fmt: skip
        for i in range(gl.maximum(right, begin), last):
            dk, dv, ds = _step(t + i, end, blocks, k, v, memory, dk, dv, ds, i * BLOCK_M, start_n, S, LEFT, RIGHT,
                               BLOCK_M, BLOCK_N, D, STAGES, RING, CONSUMER, False, True)  # fmt: skip
    stage, _ = stage_of(end - 1, STAGES)
    dk = warpgroup_mma(ds, memory.qs.index(stage).reshape([BLOCK_M, D]), dk, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, D]
    dk = warpgroup_mma_wait(0, deps=(dk,))
    mbarrier.arrive(memory.q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _consume(
    memory, work, F, LEFT, RIGHT, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    RING: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dS^T, dV and dK of half of the keys of every block, as messages to the gatherer."""
    KEYS: gl.constexpr = 2 * BLOCK_N
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_M), k_width=2)
    blocks, count = 0, 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        _b, _h_k, S = _place(item, F, work)
        for block in range(gl.cdiv(work.n_k, KEYS)):
            tiles = _tiles_of(block, S, F, work, LEFT, RIGHT, BLOCK_M, KEYS)
            dk = gl.zeros([BLOCK_N, D], gl.float32, accumulator(D))
            dv = gl.zeros([BLOCK_N, D], gl.float32, accumulator(D))
            mbarrier.wait(memory.kv_full, blocks & 1)
            k = memory.ks.index(CONSUMER).reshape([BLOCK_N, D]).load(A)
            v = memory.vs.index(CONSUMER).reshape([BLOCK_N, D]).load(A)
            mbarrier.arrive(memory.kv_empty, count=1)
            if tiles[3] > tiles[0]:
                dk, dv = _sum(k, v, memory, work.group, count, blocks, tiles, block * KEYS + CONSUMER * BLOCK_N, dk, dv, S,
                              LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, RING, CONSUMER)  # fmt: skip
                count += work.group * (tiles[3] - tiles[0])
            _send(dv.to(memory.ks.dtype), memory, _sent(count, blocks), CONSUMER, RING, BLOCK_N)
            _send((dk * S.scale).to(memory.ks.dtype), memory, _sent(count, blocks) + 1, CONSUMER, RING, BLOCK_N)
            blocks += 1


@gluon.jit
def _deliver(desc, b, h_k, start_n, memory, number, RING: gl.constexpr, BLOCK_N: gl.constexpr):
    """Send message number `number` of both consumers out: dV or dK of a block."""
    place, phase = stage_of(number, RING)
    mbarrier.wait(memory.ds_full.index(place), phase)
    for c in gl.static_range(2):
        tma_store(desc, [b, h_k, start_n + c * BLOCK_N, 0], memory.dss.index(2 * place + c))
    tma.store_wait(0)
    mbarrier.arrive(memory.ds_empty.index(place), count=1)


@gluon.jit
def _gather_tile(
    kt0, kt1, memory, number, use, fresh, done, dq_desc, b, h, start_m, S, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    D: gl.constexpr, TILES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Add a block's part to dQ of a tile of queries, whose slot's use this is number `use`, from message number `number`: to 0
    if it is `fresh`, and send it out if it is `done`."""
    Q_LAYOUT: gl.constexpr = accumulator(BLOCK_M)
    slot = use % TILES
    place, phase = stage_of(number, RING)
    if fresh:
        dqt = gl.zeros([D, BLOCK_M], gl.float32, Q_LAYOUT)
    else:
        dqt = memory.slots.index(slot).load(Q_LAYOUT)
    mbarrier.wait(memory.ds_full.index(place), phase)
    ds0 = memory.dss.index(2 * place).reshape([BLOCK_N, BLOCK_M])
    ds1 = memory.dss.index(2 * place + 1).reshape([BLOCK_N, BLOCK_M])
    dqt = warpgroup_mma(kt0, ds0, dqt, is_async=True)  # [D, BLOCK_N] @ [BLOCK_N, BLOCK_M]
    dqt = warpgroup_mma(kt1, ds1, dqt, is_async=True)  # [D, BLOCK_N] @ [BLOCK_N, BLOCK_M]
    dqt = warpgroup_mma_wait(0, deps=(dqt,))
    mbarrier.arrive(memory.ds_empty.index(place), count=1)
    if done:
        tma.store_wait(0)  # that of the tile before: it has left its slot
        dq = _slot(memory.slots, slot, memory.qs.index(0))
        dq.reshape([BLOCK_M, D]).permute((1, 0)).store((dqt * S.scale).to(memory.qs.dtype))
        fence_async_shared()
        tma_store(dq_desc, [b, h, start_m, 0], dq)
    else:
        memory.slots.index(slot).store(dqt)


@gluon.jit
def _gather(
    dq_desc, dk_desc, dv_desc, memory, work, F, LEFT, RIGHT, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    D: gl.constexpr, TILES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """dQ of every item; and send out what the consumers sum."""
    KEYS: gl.constexpr = 2 * BLOCK_N
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_M), k_width=2)
    uses, blocks, count = 0, 0, 0  # of slots, of blocks, of tiles so far
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        b, h_k, S = _place(item, F, work)
        reached = 0
        for block in range(gl.cdiv(work.n_k, KEYS)):
            first, _, _, last = _tiles_of(block, S, F, work, LEFT, RIGHT, BLOCK_M, KEYS)
            stays, _, _, _ = _tiles_of(block + 1, S, F, work, LEFT, RIGHT, BLOCK_M, KEYS)
            mbarrier.wait(memory.kv_full, blocks & 1)
            kt0 = memory.ks.index(0).reshape([BLOCK_N, D]).permute((1, 0)).load(A)
            kt1 = memory.ks.index(1).reshape([BLOCK_N, D]).permute((1, 0)).load(A)
            mbarrier.arrive(memory.kv_empty, count=1)
            for member in range(work.group):
                for i in range(first, last):
                    _gather_tile(
                        kt0, kt1, memory, _sent(count, blocks), uses + member * work.tiles + i, i >= reached, i < stays, dq_desc, b,
                        h_k * work.group + member, i * BLOCK_M, S, BLOCK_M, BLOCK_N, D, TILES, RING)  # fmt: skip
                    count += 1
            _deliver(dv_desc, b, h_k, block * KEYS, memory, _sent(count, blocks), RING, BLOCK_N)
            _deliver(dk_desc, b, h_k, block * KEYS, memory, _sent(count, blocks) + 1, RING, BLOCK_N)
            blocks += 1
            reached = gl.maximum(reached, last)
        uses += work.group * work.tiles


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_bwd(
    q_desc, k_desc, v_desc, o_desc, do_desc, dq_desc, dk_desc, dv_desc, LSE, DLSE, F, heads, group, n_q, n_k, tiles, items, scale,
    align, LEFT, RIGHT, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr, RING: gl.constexpr, REGISTERS: gl.constexpr, GATHERER: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, which share `items` = batch * heads / group; group * tiles = group * ceil(n_q / BLOCK_M) may
    be TILES at most.

    Descriptors of Q, O, dO and dQ (B, heads, n_q, D) in blocks of (1, 1, BLOCK_M, D), of K, V, dK and dV (B, heads / group, n_k,
    D) in blocks of (1, 1, BLOCK_N, D); D here may exceed theirs. LSE, DLSE (B, heads, n_q) fp32 contiguous; DLSE may be None. F
    as in flash_fwd. Every row is written: queries that see no key, keys that no query sees, and keys that do not exist, get 0.
    """
    gl.static_assert(BLOCK_M == D and BLOCK_N == D, "dS^T, dQ, dK and dV share buffers")
    gl.static_assert(STAGES == 3, "the next tile is waited for before the one before is free")
    # A slot's next use begins TILES tiles of queries later at least. By then consumers are done with the second tile before, for
    # which they needed the message RING before it free: the gatherer is two tiles past the slot's last use.
    gl.static_assert(TILES >= RING + 4, "a slot must be free when it is used again")
    qs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    dos = gl.allocate_shared_memory(q_desc.dtype, [STAGES - 1, 1, 1, BLOCK_M, D], do_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BLOCK_N, D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BLOCK_N, D], v_desc.layout)
    dss = gl.allocate_shared_memory(q_desc.dtype, [2 * RING, 1, 1, BLOCK_N, D], dk_desc.layout)
    slots = gl.allocate_shared_memory(gl.float32, [TILES, D, BLOCK_M], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    lses = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES - 1, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kept = gl.allocate_shared_memory(gl.float32, [TILES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Of the two that make a tile full, one is for what comes by TMA, one for lse or delta.
    q_full, q_empty, do_full, do_empty = (
        barriers(STAGES, 2),
        barriers(STAGES, 2),
        barriers(STAGES - 1, 2),
        barriers(STAGES - 1, 2),
    )
    kv_full, kv_empty, cut = barriers(1, 4).index(0), barriers(1, 3).index(0), barriers(1, 1).index(0)
    ds_full, ds_empty = barriers(RING, 2), barriers(RING, 1)
    fence_async_shared()  # for the barriers
    memory = Memory(ks, vs, qs, lses, dos, deltas, kept, slots, dss, kv_full, kv_empty, q_full, q_empty, do_full, do_empty,
                    ds_full, ds_empty, cut)  # fmt: skip
    work = Work(scale, heads, group, n_q, n_k, tiles, items, align)
    gl.warp_specialize([
        (_produce, (q_desc, k_desc, v_desc, o_desc, do_desc, LSE, DLSE, memory, work, F, LEFT, RIGHT,
                    BLOCK_M, BLOCK_N, D, STAGES, TILES)),
        (_gather, (dq_desc, dk_desc, dv_desc, memory, work, F, LEFT, RIGHT, BLOCK_M, BLOCK_N, D, TILES, RING)),
        (_consume, (memory, work, F, LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, RING, 0)),
        (_consume, (memory, work, F, LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, RING, 1)),
    ], [4, 4, 4], [GATHERER, REGISTERS, REGISTERS])  # fmt: skip
