"""The whole backward for Hopper in one launch, where a head has few queries. No atomics: the same inputs give the same bits.

A program takes a key head at a time, with the queries of its group, and its keys in blocks of two times BLOCK_N = 64. A
producer fetches tiles by TMA and forms the delta of every tile of queries. Each of two consumer warpgroups owns BLOCK_N keys of
a block, holds the scores transposed and sums dK and dV as flash_bwd_dkdv does. It also leaves every dS^T in shared memory for
the gatherer, a warpgroup with K^T in registers, which forms dQ^T += K^T dS^T: scores are computed once. From block to block dQ
stays in shared memory, in float32. Every tile of queries has a slot there: its O arrives in the slot, for delta, and in the end
its dQ leaves through it. dV and dK leave through the buffers of dS^T. Programs are persistent, as in flash_fwd.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .. import band, softmax
from .flash_bwd_consume import consume
from .flash_bwd_gather import gather
from .flash_bwd_parts import Memory, Tile, place, slot_of, tiles_of
from .loads import load, load_seen, zero_rows
from .parts import barriers, buffers, numbers, stage_of
from .work import Static, Work

# Changing these numbers never recompiles.
RUN_TIME = ["heads", "group", "n_q", "n_k", "tiles", "items", "align", "left", "right"]


@gluon.jit
def _form_delta(o, do, DLSE, row, start_m, seen_lo, seen_hi, kept, F, C: gl.constexpr):
    """delta = rowsum(O * dO) - DLSE of a tile of queries, 0 where they see no key; 16 rows at a time, as a producer has few
    registers."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for first in gl.static_range(0, C.BLOCK_M, 16):
        delta = softmax.delta(o.slice(first, 16).load(LAYOUT), do.slice(first, 16).load(LAYOUT), F)
        offs_m = start_m + first + gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT))
        seen = (offs_m >= seen_lo) & (offs_m < seen_hi)
        if DLSE is not None:
            delta -= gl.load(DLSE + row + offs_m, mask=seen, other=0.0)
        kept.slice(first, 16).store(gl.where(seen, delta, 0.0))


@gluon.jit
def _fetch_queries(
    q_desc, o_desc, do_desc, STATS, DLSE, memory, tile, seen_lo, seen_hi, cuts, work, F, C: gl.constexpr
):  # fmt: skip
    """Load Q and dO of a tile, with maxima, sums and delta, as soon as their buffers are empty. For a fresh tile form delta,
    with O in the tile's slot, and keep it for later blocks. Returns cuts, how often memory.cut was used so far."""
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    start_m = tile.start_m
    at = [tile.b, tile.h, start_m, 0]
    stage, phase = stage_of(tile.number, C.STAGES)
    row = (tile.b * work.heads + tile.h).to(gl.int64) * work.n_q
    offs_m = start_m + gl.arange(0, C.BLOCK_M, layout=ROWS)
    m = softmax.load_maximum(STATS + 2 * row, offs_m, seen_lo, seen_hi, True)
    log2_l = softmax.load_log2_sum(STATS + 2 * row, offs_m, work.n_q, seen_lo, seen_hi, True)
    mbarrier.wait(memory.q_empty.index(stage), phase ^ 1)
    q, q_full = memory.qs.index(stage), memory.q_full.index(stage)
    cuts = load_seen((q_desc,), at, q_full, (q,), start_m, seen_lo, seen_hi, work.n_q, memory.cut, cuts)
    memory.maxima.index(stage).store(m)
    memory.sums.index(stage).store(log2_l)
    mbarrier.arrive(q_full, count=1)
    do_stage, do_phase = stage_of(tile.number, C.STAGES - 1)
    slot = tile.use % C.TILES
    do = memory.dos.index(do_stage)
    mbarrier.wait(memory.do_empty.index(do_stage), do_phase ^ 1)
    if tile.fresh:
        o = slot_of(memory, slot, C)
        load((o_desc, do_desc), at, memory.cut, (o, do))
        mbarrier.wait(memory.cut, cuts & 1)
        cuts += 1
        _form_delta(
            o.reshape([C.BLOCK_M, C.BLOCK_D]), do.reshape([C.BLOCK_M, C.BLOCK_D]), DLSE, row, start_m, seen_lo, seen_hi,
            memory.kept.index(slot), F, C)  # fmt: skip
        if (start_m < seen_lo) | (gl.minimum(start_m + C.BLOCK_M, work.n_q) > seen_hi):
            zero_rows(do, seen_lo - start_m, seen_hi - start_m)
            fence_async_shared()
        mbarrier.arrive(memory.do_full.index(do_stage), count=1)
    else:
        do_full = memory.do_full.index(do_stage)
        cuts = load_seen((do_desc,), at, do_full, (do,), start_m, seen_lo, seen_hi, work.n_q, memory.cut, cuts)
    memory.deltas.index(do_stage).store(memory.kept.index(slot).load(ROWS))
    mbarrier.arrive(memory.do_full.index(do_stage), count=1)
    return cuts


@gluon.jit
def _produce(q_desc, k_desc, v_desc, o_desc, do_desc, STATS, DLSE, memory, work, F, C: gl.constexpr):
    """For every block of keys of every item, fetch K and V as soon as the last ones are in registers, then its tiles of
    queries."""
    KEYS: gl.constexpr = 2 * C.BLOCK_N
    uses, blocks, count, cuts = 0, 0, 0, 0  # slots, blocks, tiles of queries and uses of memory.cut so far
    for index in range(gl.program_id(0), work.items, gl.num_programs(0)):
        b, h_k, scorer = place(index, work, F, C)
        n_q = gl.where(scorer.n_k > 0, work.n_q, 0)
        k_lo, _, _, k_hi = band.key_range(0, work.n_q, scorer.n_k, scorer.shift, work.left, work.right, F, KEYS)
        q_lo, _, _, q_hi = band.query_range(0, scorer.n_k, n_q, scorer.shift, work.left, work.right, F, C.BLOCK_M)
        reached = 0
        for block in range(gl.cdiv(work.n_k, KEYS)):
            first, _, _, last = tiles_of(block, scorer, work, F, C)
            mbarrier.wait(memory.kv_empty, (blocks & 1) ^ 1)
            for c in gl.static_range(2):
                start = block * KEYS + c * C.BLOCK_N
                at, full, k, v = [b, h_k, start, 0], memory.kv_full, memory.ks.index(c), memory.vs.index(c)
                cuts = load_seen((k_desc,), at, full, (k,), start, k_lo, k_hi, work.n_k, memory.cut, cuts)
                cuts = load_seen((v_desc,), at, full, (v,), start, k_lo, k_hi, work.n_k, memory.cut, cuts)
            blocks += 1
            for member in range(work.group):
                for i in range(first, last):
                    use = uses + member * work.tiles + i
                    tile = Tile(b, h_k * work.group + member, i * C.BLOCK_M, count, use, i >= reached)
                    cuts = _fetch_queries(
                        q_desc, o_desc, do_desc, STATS, DLSE, memory, tile, q_lo, q_hi, cuts, work, F, C)  # fmt: skip
                    count += 1
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

    Descriptors of Q, O, dO and dQ (B, heads, n_q, HEAD_DIM) in blocks of (1, 1, BLOCK_M, BLOCK_D), of K, V, dK and dV (B,
    heads / group, n_k, HEAD_DIM) in blocks of (1, 1, BLOCK_N, BLOCK_D), HEAD_DIM <= BLOCK_D. STATS as in flash_fwd, DLSE (B,
    heads, n_q), fp32 contiguous; DLSE may be None. F as in flash_fwd. Every row is written: queries that see no key, keys that
    no query sees or that do not exist get 0.
    """
    gl.static_assert(BLOCK_M == BLOCK_D and BLOCK_N == BLOCK_D, "dS^T, dQ, dK and dV share buffers")
    gl.static_assert(STAGES == 3, "the next tile is waited for before the one before is free")
    # A slot's next use begins TILES tiles of queries later at least. By then consumers are done with the second tile before,
    # for which they needed the message RING before it free: the gatherer is two tiles past the slot's last use.
    gl.static_assert(TILES >= RING + 4, "a slot must be free when it is used again")
    C: gl.constexpr = Static(
        LINEAR=True, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, STAGES=STAGES, TILES=TILES, RING=RING)  # fmt: skip
    qs, dos = buffers(q_desc, STAGES), buffers(do_desc, STAGES - 1)
    ks, vs = buffers(k_desc, 2), buffers(v_desc, 2)
    dss = buffers(dk_desc, 2 * RING)
    # Twice a tile of 16 bits, not once one of 32: TMA wants the alignment that its own layout has.
    slots = gl.allocate_shared_memory(q_desc.dtype, [TILES, 1, 1, 2 * BLOCK_M, BLOCK_D], o_desc.layout)
    maxima, sums = numbers(STAGES, BLOCK_M), numbers(STAGES, BLOCK_M)
    deltas, kept = numbers(STAGES - 1, BLOCK_M), numbers(TILES, BLOCK_M)
    # Of the two arrivals that make a tile full, one is for what comes by TMA, one for the others.
    q_full, q_empty = barriers(STAGES, 2), barriers(STAGES, 2)
    do_full, do_empty = barriers(STAGES - 1, 2), barriers(STAGES - 1, 2)
    kv_full, kv_empty, cut = barriers(1, 4).index(0), barriers(1, 3).index(0), barriers(1, 1).index(0)
    ds_full, ds_empty = barriers(RING, 2), barriers(RING, 1)
    fence_async_shared()  # for the barriers
    memory = Memory(ks, vs, qs, maxima, sums, dos, deltas, kept, slots, dss, kv_full, kv_empty, q_full, q_empty, do_full,
                    do_empty, ds_full, ds_empty, cut)  # fmt: skip
    work = Work(scale, 0, heads, group, n_q, n_k, tiles, items, align, left, right)
    gl.warp_specialize([
        (_produce, (q_desc, k_desc, v_desc, o_desc, do_desc, STATS, DLSE, memory, work, F, C)),
        (gather, (dq_desc, dk_desc, dv_desc, memory, work, F, C)),
        (consume, (memory, work, F, C, 0)),
        (consume, (memory, work, F, C, 1)),
    ], [4, 4, 4], [GATHERER, REGISTERS, REGISTERS])  # fmt: skip
