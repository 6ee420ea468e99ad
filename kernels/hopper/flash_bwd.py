"""The whole backward for Hopper in one launch, where a head has few queries. No atomics: the same inputs give the same bits.

A program takes a key head at a time, with the queries of its group, and its keys in blocks of two times BLOCK_N = 64. A
producer fetches tiles by TMA and forms the delta of every tile of queries. Each of two consumer warpgroups owns BLOCK_N keys of
a block, holds the scores transposed and sums dK and dV as flash_bwd_dkdv does. But it also leaves every dS^T in shared memory,
where a gatherer, a warpgroup with K^T in registers, forms dQ^T += K^T dS^T: scores are computed once. From block to block dQ
stays in shared memory, in float32: every tile of queries has a slot there, in which first its O arrives, for delta, and through
which in the end dQ leaves. dV and dK leave through the buffers of dS^T. Programs are persistent, as in flash_fwd.
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

from .. import band, softmax
from .flash_bwd_consume import consume
from .flash_bwd_parts import Memory, Work, place, sent, tiles_of
from .parts import accumulator, barriers, reinterpret, stage_of, tma_load, tma_store, zero_rows

# Changing these numbers never recompiles.
RUN_TIME = ["heads", "group", "n_q", "n_k", "tiles", "items", "align", "left", "right"]


@gluon.jit
def _slot(slots, i, like):
    """A slot as a tile of queries of 16-bit numbers, like those of qs."""
    return reinterpret(slots.index(i), like.dtype, like.shape, like.layout)


@gluon.jit
def _partial(slots, i, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr):
    """A slot as dQ^T in float32; as stores and loads of a product's layout meet no bank conflicts."""
    return reinterpret(slots.index(i), gl.float32, [BLOCK_D, BLOCK_M], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))


@gluon.jit
def _load_seen(desc, b, h, start, buffer, full, seen_lo, seen_hi, n, cut, cuts, ROWS: gl.constexpr, BLOCK_D: gl.constexpr):
    """A tile of rows from `start` on by TMA, which arrives at `full`; its rows below n, but outside of [seen_lo, seen_hi), are
    zeroed first. Returns how many tiles came by `cut`."""
    if (start < seen_lo) | (gl.minimum(start + ROWS, n) > seen_hi):
        mbarrier.expect(cut, desc.block_type.nbytes)
        tma_load(desc, [b, h, start, 0], cut, buffer)
        mbarrier.wait(cut, cuts & 1)
        zero_rows(buffer.reshape([ROWS, BLOCK_D]), seen_lo - start, seen_hi - start, ROWS)
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
    q_desc, o_desc, do_desc, STATS, DLSE, memory, count, use, fresh, b, h, start_m, seen_lo, seen_hi, cuts, F, work,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Tile number `count` of Q and dO, with maxima, sums and delta, as buffers fall free. When it is `fresh`, its O arrives in
    its slot, of which this is use number `use`, and delta is formed, which is then kept for later blocks."""
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    stage, phase = stage_of(count, STAGES)
    row = (b * work.heads + h).to(gl.int64) * work.n_q
    offs_m = start_m + gl.arange(0, BLOCK_M, layout=ROWS)
    m = softmax.load_maximum(STATS + 2 * row, offs_m, seen_lo, seen_hi, True)
    log2_l = softmax.load_log2_sum(STATS + 2 * row, offs_m, work.n_q, seen_lo, seen_hi, True)
    mbarrier.wait(memory.q_empty.index(stage), phase ^ 1)
    cuts = _load_seen(
        q_desc, b, h, start_m, memory.qs.index(stage), memory.q_full.index(stage), seen_lo, seen_hi, work.n_q, memory.cut, cuts,
        BLOCK_M, BLOCK_D)  # fmt: skip
    memory.maxima.index(stage).store(m)
    memory.sums.index(stage).store(log2_l)
    mbarrier.arrive(memory.q_full.index(stage), count=1)
    do_stage, do_phase = stage_of(count, STAGES - 1)
    slot = use % TILES
    mbarrier.wait(memory.do_empty.index(do_stage), do_phase ^ 1)
    if fresh:
        o = _slot(memory.slots, slot, memory.qs.index(0))
        mbarrier.expect(memory.cut, 2 * q_desc.block_type.nbytes)
        tma_load(o_desc, [b, h, start_m, 0], memory.cut, o)
        tma_load(do_desc, [b, h, start_m, 0], memory.cut, memory.dos.index(do_stage))
        mbarrier.wait(memory.cut, cuts & 1)
        cuts += 1
        do = memory.dos.index(do_stage).reshape([BLOCK_M, BLOCK_D])
        _form_delta(
            o.reshape([BLOCK_M, BLOCK_D]), do, DLSE, row, start_m, seen_lo, seen_hi, memory.kept.index(slot), F, BLOCK_M
        )
        if (start_m < seen_lo) | (gl.minimum(start_m + BLOCK_M, work.n_q) > seen_hi):
            zero_rows(do, seen_lo - start_m, seen_hi - start_m, BLOCK_M)
            fence_async_shared()
        mbarrier.arrive(memory.do_full.index(do_stage), count=1)
    else:
        cuts = _load_seen(
            do_desc, b, h, start_m, memory.dos.index(do_stage), memory.do_full.index(do_stage), seen_lo, seen_hi, work.n_q,
            memory.cut, cuts, BLOCK_M, BLOCK_D)  # fmt: skip
    memory.deltas.index(do_stage).store(memory.kept.index(slot).load(ROWS))
    mbarrier.arrive(memory.do_full.index(do_stage), count=1)
    return cuts


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, o_desc, do_desc, STATS, DLSE, memory, work, F, left, right, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """For every block of keys of every item, K and V as soon as the last ones are in registers; then its tiles of queries."""
    KEYS: gl.constexpr = 2 * BLOCK_N
    uses, blocks, count, cuts = 0, 0, 0, 0  # of slots, of blocks and of tiles of queries so far
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        b, h_k, scorer = place(item, F, work)
        k_lo, _, _, k_hi = band.key_range(0, work.n_q, scorer.n_k, scorer.shift, left, right, F, KEYS)
        q_lo, _, _, q_hi = band.query_range(
            0, scorer.n_k, gl.where(scorer.n_k > 0, work.n_q, 0), scorer.shift, left, right, F, BLOCK_M
        )
        reached = 0
        for block in range(gl.cdiv(work.n_k, KEYS)):
            first, _, _, last = tiles_of(block, scorer, F, work, left, right, BLOCK_M, KEYS)
            mbarrier.wait(memory.kv_empty, (blocks & 1) ^ 1)
            for c in gl.static_range(2):
                start = block * KEYS + c * BLOCK_N
                cuts = _load_seen(
                    k_desc, b, h_k, start, memory.ks.index(c), memory.kv_full, k_lo, k_hi, work.n_k, memory.cut, cuts,
                    BLOCK_N, BLOCK_D)  # fmt: skip
                cuts = _load_seen(
                    v_desc, b, h_k, start, memory.vs.index(c), memory.kv_full, k_lo, k_hi, work.n_k, memory.cut, cuts,
                    BLOCK_N, BLOCK_D)  # fmt: skip
            blocks += 1
            for member in range(work.group):
                for i in range(first, last):
                    cuts = _fetch_queries(
                        q_desc, o_desc, do_desc, STATS, DLSE, memory, count, uses + member * work.tiles + i, i >= reached, b,
                        h_k * work.group + member, i * BLOCK_M, q_lo, q_hi, cuts, F, work,
                        BLOCK_M, BLOCK_D, STAGES, TILES)  # fmt: skip
                    count += 1
            reached = gl.maximum(reached, last)
        uses += work.group * work.tiles


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
    kt0, kt1, memory, number, use, fresh, done, dq_desc, b, h, start_m, scorer, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, TILES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Add a block's part to dQ of a tile of queries, whose slot's use this is number `use`, from message number `number`: to 0
    if it is `fresh`, and send it out if it is `done`."""
    Q_LAYOUT: gl.constexpr = accumulator(BLOCK_M)
    slot = use % TILES
    place, phase = stage_of(number, RING)
    if fresh:
        dqt = gl.zeros([BLOCK_D, BLOCK_M], gl.float32, Q_LAYOUT)
    else:
        dqt = _partial(memory.slots, slot, BLOCK_M, BLOCK_D).load(Q_LAYOUT)
    mbarrier.wait(memory.ds_full.index(place), phase)
    ds0 = memory.dss.index(2 * place).reshape([BLOCK_N, BLOCK_M])
    ds1 = memory.dss.index(2 * place + 1).reshape([BLOCK_N, BLOCK_M])
    dqt = warpgroup_mma(kt0, ds0, dqt, is_async=True)  # [BLOCK_D, BLOCK_N] @ [BLOCK_N, BLOCK_M]
    dqt = warpgroup_mma(kt1, ds1, dqt, is_async=True)  # [BLOCK_D, BLOCK_N] @ [BLOCK_N, BLOCK_M]
    dqt = warpgroup_mma_wait(0, deps=(dqt,))
    mbarrier.arrive(memory.ds_empty.index(place), count=1)
    if done:
        tma.store_wait(0)  # that of the tile before: it has left its slot
        dq = _slot(memory.slots, slot, memory.qs.index(0))
        dq.reshape([BLOCK_M, BLOCK_D]).permute((1, 0)).store((dqt * scorer.scale).to(memory.qs.dtype))
        fence_async_shared()
        tma_store(dq_desc, [b, h, start_m, 0], dq)
    else:
        _partial(memory.slots, slot, BLOCK_M, BLOCK_D).store(dqt)


@gluon.jit
def _gather(
    dq_desc, dk_desc, dv_desc, memory, work, F, left, right, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, TILES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """dQ of every item; and send out what the consumers sum."""
    KEYS: gl.constexpr = 2 * BLOCK_N
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_M), k_width=2)
    uses, blocks, count = 0, 0, 0  # of slots, of blocks, of tiles so far
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        b, h_k, scorer = place(item, F, work)
        reached = 0
        for block in range(gl.cdiv(work.n_k, KEYS)):
            first, _, _, last = tiles_of(block, scorer, F, work, left, right, BLOCK_M, KEYS)
            stays, _, _, _ = tiles_of(block + 1, scorer, F, work, left, right, BLOCK_M, KEYS)
            mbarrier.wait(memory.kv_full, blocks & 1)
            kt0 = memory.ks.index(0).reshape([BLOCK_N, BLOCK_D]).permute((1, 0)).load(A)
            kt1 = memory.ks.index(1).reshape([BLOCK_N, BLOCK_D]).permute((1, 0)).load(A)
            mbarrier.arrive(memory.kv_empty, count=1)
            for member in range(work.group):
                for i in range(first, last):
                    _gather_tile(
                        kt0, kt1, memory, sent(count, blocks), uses + member * work.tiles + i, i >= reached, i < stays, dq_desc,
                        b, h_k * work.group + member, i * BLOCK_M, scorer, BLOCK_M, BLOCK_N, BLOCK_D, TILES, RING)  # fmt: skip
                    count += 1
            _deliver(dv_desc, b, h_k, block * KEYS, memory, sent(count, blocks), RING, BLOCK_N)
            _deliver(dk_desc, b, h_k, block * KEYS, memory, sent(count, blocks) + 1, RING, BLOCK_N)
            blocks += 1
            reached = gl.maximum(reached, last)
        uses += work.group * work.tiles


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_bwd(
    q_desc, k_desc, v_desc, o_desc, do_desc, dq_desc, dk_desc, dv_desc, STATS, DLSE, F, heads, group, n_q, n_k, tiles, items,
    scale, align, left, right, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr, RING: gl.constexpr, REGISTERS: gl.constexpr, GATHERER: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, which share `items` = batch * heads / group. tiles = ceil(n_q / BLOCK_M); a group may have
    TILES in all.

    Descriptors of Q, O, dO and dQ (B, heads, n_q, BLOCK_D) in blocks of (1, 1, BLOCK_M, BLOCK_D), of K, V, dK and dV (B, heads
    / group, n_k, BLOCK_D) in blocks of (1, 1, BLOCK_N, BLOCK_D); BLOCK_D here may exceed theirs. STATS as in flash_fwd, DLSE
    (B, heads, n_q), fp32 contiguous; DLSE may be None. F as in flash_fwd. Every row is written: queries that see no key, keys
    that no query sees or that do not exist get 0.
    """
    gl.static_assert(BLOCK_M == BLOCK_D and BLOCK_N == BLOCK_D, "dS^T, dQ, dK and dV share buffers")
    gl.static_assert(STAGES == 3, "the next tile is waited for before the one before is free")
    # A slot's next use begins TILES tiles of queries later at least. By then consumers are done with the second tile before,
    # for which they needed the message RING before it free: the gatherer is two tiles past the slot's last use.
    gl.static_assert(TILES >= RING + 4, "a slot must be free when it is used again")
    qs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    dos = gl.allocate_shared_memory(q_desc.dtype, [STAGES - 1, 1, 1, BLOCK_M, BLOCK_D], do_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    dss = gl.allocate_shared_memory(q_desc.dtype, [2 * RING, 1, 1, BLOCK_N, BLOCK_D], dk_desc.layout)
    # Twice a tile of 16 bits, not once one of 32: TMA wants the alignment that its own layout has.
    slots = gl.allocate_shared_memory(q_desc.dtype, [TILES, 1, 1, 2 * BLOCK_M, BLOCK_D], o_desc.layout)
    maxima = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sums = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES - 1, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kept = gl.allocate_shared_memory(gl.float32, [TILES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Of the two that make a tile full, one is for what comes by TMA, one for the others.
    q_full, q_empty, do_full, do_empty = (
        barriers(STAGES, 2),
        barriers(STAGES, 2),
        barriers(STAGES - 1, 2),
        barriers(STAGES - 1, 2),
    )
    kv_full, kv_empty, cut = barriers(1, 4).index(0), barriers(1, 3).index(0), barriers(1, 1).index(0)
    ds_full, ds_empty = barriers(RING, 2), barriers(RING, 1)
    fence_async_shared()  # for the barriers
    memory = Memory(ks, vs, qs, maxima, sums, dos, deltas, kept, slots, dss, kv_full, kv_empty, q_full, q_empty, do_full,
                    do_empty, ds_full, ds_empty, cut)  # fmt: skip
    work = Work(scale, heads, group, n_q, n_k, tiles, items, align)
    gl.warp_specialize([
        (_produce, (q_desc, k_desc, v_desc, o_desc, do_desc, STATS, DLSE, memory, work, F, left, right,
                    BLOCK_M, BLOCK_N, BLOCK_D, STAGES, TILES)),
        (_gather, (dq_desc, dk_desc, dv_desc, memory, work, F, left, right, BLOCK_M, BLOCK_N, BLOCK_D, TILES, RING)),
        (consume, (memory, work, F, left, right, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RING, 0)),
        (consume, (memory, work, F, left, right, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RING, 1)),
    ], [4, 4, 4], [GATHERER, REGISTERS, REGISTERS])  # fmt: skip
