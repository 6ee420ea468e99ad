"""dK and dV for Hopper. No atomics: the same inputs give the same bits.

A producer fetches tiles of queries by TMA and sends dK and dV out, each of one or two consumer warpgroups owns BLOCK_N = 64
keys and sums over the queries of its head, or of the whole group of heads that share the key. Scores are held transposed, so
that P^T and dS^T are operands in registers. A consumer issues S_i^T = K Q_i^T and dK += dS_{i-1}^T Q_{i-1} together, forms P_i
under the second and under dP_i^T = V dO_i^T, and forms dS_i under dV += P_i^T dO_i. Which queries see a key is as in
kernels/band.py.
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
from ..static import Static
from .parts import (
    accumulator,
    barriers,
    load_rows,
    stage_of,
    store_rows,
    survivors_transposed,
    tma_load,
    tma_store,
    zero_rows,
)

# Changing these numbers never recompiles.
RUN_TIME = ["stride_dk", "stride_dv", "batch", "heads", "group", "n_q", "n_k", "tiles", "align", "left", "right"]


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, STATS, DELTA, F, memory, seq, heads, h_k, group, start_n, first, lo, hi,
    n_q, seen_lo, seen_hi, LINEAR: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Fetch K and V once, then Q, dO, maxima, sums and delta of every tile from `first` to hi of every head of the group, as
    their buffers fall free. In the end send dK and dV out, which consumers leave in the memory of K and V; zeros for keys
    outside of [seen_lo, seen_hi)."""
    ks, vs, qs, dos, maxima, sums, deltas, kv_full, full, empty, cut, done = memory
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for c in gl.static_range(CONSUMERS):
        at = [seq.at, h_k, seq.k_row + start_n + c * BLOCK_N, 0]
        mbarrier.expect(kv_full.index(c), 2 * k_desc.block_type.nbytes)
        tma_load(k_desc, at, kv_full.index(c), ks.index(c))
        tma_load(v_desc, at, kv_full.index(c), vs.index(c))
    n_tiles = gl.cdiv(gl.maximum(hi - first, 0), BLOCK_M)
    cuts = 0
    for member in range(group):
        h = h_k * group + member
        row = (seq.at * heads + h).to(gl.int64) * n_q + seq.q_row
        for i in range(n_tiles):
            stage, phase = stage_of(member * n_tiles + i, STAGES)
            start_m = first + i * BLOCK_M
            offs_m = start_m + gl.arange(0, BLOCK_M, layout=ROWS)
            stats = softmax.stats_at(STATS, seq, h, heads, n_q, 2)
            m = softmax.load_maximum(stats, offs_m, lo, hi, True)
            log2_l = softmax.load_log2_sum(stats, offs_m, n_q, lo, hi, True)
            delta = tile.load_row_values(DELTA + row, offs_m, lo, hi, 0.0, True)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            cuts = load_rows(
                q_desc, do_desc, [seq.at, h, seq.q_row + start_m, 0], qs.index(stage), dos.index(stage), full.index(stage),
                cut.index(0), cuts, lo - start_m, hi - start_m, n_q, BLOCK_M, BLOCK_D)  # fmt: skip
            maxima.index(stage).store(m)
            sums.index(stage).store(log2_l)
            deltas.index(stage).store(delta)
            mbarrier.arrive(full.index(stage), count=1)
    if F.cu_k is None:
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(done.index(c), 0)
            start = start_n + c * BLOCK_N
            if (start < seen_lo) | (start + BLOCK_N > seen_hi):
                zero_rows(ks.index(c).reshape([BLOCK_N, BLOCK_D]), seen_lo - start, seen_hi - start, BLOCK_N)
                zero_rows(vs.index(c).reshape([BLOCK_N, BLOCK_D]), seen_lo - start, seen_hi - start, BLOCK_N)
                fence_async_shared()
            tma_store(dk_desc, [seq.at, h_k, start, 0], ks.index(c))
            tma_store(dv_desc, [seq.at, h_k, start, 0], vs.index(c))
        tma.store_wait(0)


@gluon.jit
def _step(
    t, total, k, v, memory, dk, dv, ds, bh, start_m, start_n, F, scorer, left, right, C: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dS and dV of tile number t, queries from start_m on, and dK of the tile before it, whose dS^T is ds."""
    ks, vs, qs, dos, maxima, sums, deltas, _kv_full, full, empty, _cut, _done = memory
    stage, phase = stage_of(t, STAGES)
    before, _ = stage_of(t - 1, STAGES)
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_M)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_D), k_width=2)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S_LAYOUT)
    # t >= 0: always CONSUMER. The loops would keep a constant's addresses, of each step of a product, in registers.
    if BLOCK_D > 64:
        k = ks.index(CONSUMER + gl.minimum(t, 0)).reshape([BLOCK_N, BLOCK_D])
        v = vs.index(CONSUMER + gl.minimum(t, 0)).reshape([BLOCK_N, BLOCK_D])
    q = qs.index(stage).reshape([BLOCK_M, BLOCK_D])
    do = dos.index(stage).reshape([BLOCK_M, BLOCK_D])
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
    m, log2_l = maxima.index(stage).load(COLUMNS), sums.index(stage).load(COLUMNS)
    if FIRST:
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        dk = warpgroup_mma(
            ds, qs.index(before).reshape([BLOCK_M, BLOCK_D]), dk, is_async=True
        )  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
        s = warpgroup_mma_wait(1, deps=(s,))
    offs_m = start_m + gl.arange(0, BLOCK_M, layout=COLUMNS)
    offs_n = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT))
    s, keep, slope = score.logits(
        s, offs_m[None, :], offs_n[:, None], start_m, start_n, F, scorer, left, right, C, MASKED, MASKED)  # fmt: skip
    p = softmax.weights(gl.where(keep, s, float("-inf")), m[None, :], log2_l[None, :], scorer)
    kept = p
    if F.dropout is not None:  # of what is dropped p is negative, so that one register holds both
        p = gl.where(survivors_transposed(F.dropout, bh, start_m, start_n, p), p, -p)
        kept = gl.maximum(p, 0.0)
    mbarrier.wait(full.index(stage), phase)  # passed long ago, but a branch
    delta = deltas.index(stage).load(COLUMNS)[None, :]
    dp = zero
    if F.dropout is None:
        dp = zero - delta  # so that dP - delta comes out of the product
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, is_async=True)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
    if not FIRST:
        dk, p = warpgroup_mma_wait(1, deps=(dk, p))
        mbarrier.arrive(empty.index(before), count=1)
    pt = gl.convert_layout(kept.to(do.dtype), A_LAYOUT)
    dv = warpgroup_mma(pt, do, dv, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    dp = warpgroup_mma_wait(1, deps=(dp,))
    if F.dropout is None:
        x = p * dp
    else:
        x = gl.maximum(p, 0.0) * (dp * F.dropout.factor) - gl.abs(p) * delta
    if F.softcap is not None or C.MOD is not None:
        x = gl.where(keep, x * slope, 0.0)
    following = gl.convert_layout(x.to(q.dtype), A_LAYOUT)
    # A real branch: without one ptxas moves the wait below above dS, and nothing overlaps.
    ahead, phase_ahead = stage_of(t + 1, STAGES)
    mbarrier.wait(full.index(ahead), phase_ahead, pred=t + 1 < total)
    dv, following = warpgroup_mma_wait(0, deps=(dv, following))
    return dk, dv, following


@gluon.jit
def _sum(
    k, v, memory, dk, dv, seq, heads, h_k, group, start_n, first, queries, scale, F, scorer, left, right, MOD: gl.constexpr,
    MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dk and dv over all tiles of queries, of which there is one at least."""
    _ks, _vs, qs, _dos, _maxima, _sums, _deltas, _kv_full, full, _empty, _cut, _done = memory
    _lo, full_lo, full_hi, hi = queries
    n_tiles = gl.cdiv(hi - first, BLOCK_M)
    total = group * n_tiles
    bh = seq.b * heads + h_k * group
    ds = gl.zeros([BLOCK_N, BLOCK_M], qs.dtype, gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_D), k_width=2))
    C: gl.constexpr = Static(MOD=MOD, MOD_GRAD=MOD_GRAD, LINEAR=LINEAR, MASK_VEC=0)
    mbarrier.wait(full.index(0), 0)
    dk, dv, ds = _step(
        0, total, k, v, memory, dk, dv, ds, bh, first, start_n, F, scorer, left, right,
        C, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER, True, True)  # fmt: skip
    full_begin = gl.minimum((full_lo - first) // BLOCK_M, n_tiles)
    full_end = gl.minimum(gl.maximum((full_hi - first) // BLOCK_M, full_begin), n_tiles)
    for member in range(group):
        scorer_h = score.prepare(F, seq, h_k * group + member, scale, scorer.shift, C)
        t = member * n_tiles
        begin = gl.maximum(1 - member, 0)
        if right is not None:
            for i in range(begin, full_begin):
                dk, dv, ds = _step(
                    t + i, total, k, v, memory, dk, dv, ds, bh + member, first + i * BLOCK_M, start_n, F, scorer_h, left, right,
                    C, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER, False, True)  # fmt: skip
        for i in range(gl.maximum(full_begin, begin), full_end):
            dk, dv, ds = _step(
                t + i, total, k, v, memory, dk, dv, ds, bh + member, first + i * BLOCK_M, start_n, F, scorer_h, left, right,
                C, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER, False, False)  # fmt: skip
        for i in range(gl.maximum(full_end, begin), n_tiles):
            dk, dv, ds = _step(
                t + i, total, k, v, memory, dk, dv, ds, bh + member, first + i * BLOCK_M, start_n, F, scorer_h, left, right,
                C, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER, False, True)  # fmt: skip
    last, _ = stage_of(total - 1, STAGES)
    dk = warpgroup_mma(
        ds, qs.index(last).reshape([BLOCK_M, BLOCK_D]), dk, is_async=True
    )  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    dk = warpgroup_mma_wait(0, deps=(dk,))
    return dk, dv


@gluon.jit
def _consume(
    DK, DV, stride_dk, stride_dv, memory, seq, heads, h_k, group, start_n, first, queries, seen_lo, seen_hi, scale, F, scorer,
    left, right, MOD: gl.constexpr, MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """All of 64 keys: dK and dV."""
    ks, vs, _qs, _dos, _maxima, _sums, _deltas, kv_full, _full, _empty, _cut, done = memory
    D_LAYOUT: gl.constexpr = accumulator(BLOCK_D)
    start_n += CONSUMER * BLOCK_N
    k = ks.index(CONSUMER).reshape([BLOCK_N, BLOCK_D])
    v = vs.index(CONSUMER).reshape([BLOCK_N, BLOCK_D])
    dk = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, D_LAYOUT)
    dv = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, D_LAYOUT)
    mbarrier.wait(kv_full.index(CONSUMER), 0)
    if BLOCK_D <= 64:
        A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_M), k_width=2)
        k_a = k.load(A)
        v_a = v.load(A)
    else:
        k_a = k
        v_a = v
    if queries[3] > first:
        dk, dv = _sum(
            k_a, v_a, memory, dk, dv, seq, heads, h_k, group, start_n, first, queries, scale, F, scorer, left, right,
            MOD, MOD_GRAD, LINEAR, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER)  # fmt: skip
    if F.dropout is not None:
        dv *= F.dropout.factor
    dk *= scorer.scale
    if F.cu_k is None:
        v.store(dv.to(v.dtype))
        k.store(dk.to(k.dtype))
        fence_async_shared()
        mbarrier.arrive(done.index(CONSUMER), count=1)
    else:
        row, there = seq.k_row + start_n, seq.n_k - start_n
        offs_n = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, D_LAYOUT))
        seen = ((offs_n >= seen_lo) & (offs_n < seen_hi))[:, None]
        store_rows(gl.where(seen, dv, 0.0).to(v.dtype), DV, stride_dv, seq.at, h_k, row, there, HEAD_DIM)
        store_rows(gl.where(seen, dk, 0.0).to(k.dtype), DK, stride_dk, seq.at, h_k, row, there, HEAD_DIM)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_bwd_dkdv(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, DK, DV, STATS, DELTA, F, stride_dk, stride_dv, batch, heads, group, n_q,
    n_k, tiles, scale, align, left, right, MOD: gl.constexpr, MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (batch * heads / group * tiles,), tiles = ceil(n_k / (CONSUMERS * BLOCK_N)); packed as in sequence.py.

    Descriptors of Q and dO (B, heads, n_q, HEAD_DIM) in blocks of (1, 1, BLOCK_M, BLOCK_D), of K, V, dK and dV (B, heads /
    group, n_k, HEAD_DIM) in blocks of (1, 1, BLOCK_N, BLOCK_D), HEAD_DIM <= BLOCK_D; dK and dV again, with their strides. STATS
    as in flash_fwd, and DELTA of flash_bwd_dq (B, heads, n_q), fp32 contiguous; F as in flash_fwd. Every key row is written:
    keys that no query sees, and keys that do not exist, get 0.
    """
    gl.static_assert(STAGES >= 3, "the next tile is waited for before the one before is free")
    C: gl.constexpr = Static(LINEAR=LINEAR, MASK_VEC=0)
    seq, h_k, start_n = sequence.locate_keys(F, gl.program_id(0), tiles, heads // group, batch, n_q, n_k, BLOCK_N * CONSUMERS)
    shift = align * (seq.n_k - seq.n_q)
    scorer = score.prepare(F, seq, h_k * group, scale, shift, C)
    end_n = gl.minimum(start_n + BLOCK_N * CONSUMERS, scorer.n_k)
    n_seen = gl.where(start_n < scorer.n_k, seq.n_q, 0)
    queries = band.query_range(start_n, end_n, n_seen, shift, left, right, F, BLOCK_M)
    first = band.first_tile(queries[0], F, BLOCK_M)
    # What no query sees (padding, NaN) spoils its own rows of dK and dV alone; they are zeroed in the end.
    seen_lo, _, _, seen_hi = band.key_range(0, seq.n_q, scorer.n_k, shift, left, right, F, BLOCK_N)
    ks = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    qs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    dos = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], do_desc.layout)
    maxima = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sums = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Of the two that make a tile full, one is for what comes by TMA, one for the others.
    kv_full, full, empty, cut = barriers(CONSUMERS, 1), barriers(STAGES, 2), barriers(STAGES, CONSUMERS), barriers(1, 1)
    done = barriers(CONSUMERS, 1)
    fence_async_shared()  # for the barriers
    memory = (ks, vs, qs, dos, maxima, sums, deltas, kv_full, full, empty, cut, done)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, STATS, DELTA, F, memory, seq, heads, h_k, group,
                        start_n, first, queries[0], queries[3], n_q, seen_lo, seen_hi,
                        LINEAR, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS)),
            (_consume, (DK, DV, stride_dk, stride_dv, memory, seq, heads, h_k, group, start_n, first, queries, seen_lo, seen_hi,
                        scale, F, scorer, left, right, MOD, MOD_GRAD, LINEAR, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, 0)),
        ], [4], [REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, STATS, DELTA, F, memory, seq, heads, h_k, group,
                        start_n, first, queries[0], queries[3], n_q, seen_lo, seen_hi,
                        LINEAR, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS)),
            (_consume, (DK, DV, stride_dk, stride_dv, memory, seq, heads, h_k, group, start_n, first, queries, seen_lo, seen_hi,
                        scale, F, scorer, left, right, MOD, MOD_GRAD, LINEAR, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, 0)),
            (_consume, (DK, DV, stride_dk, stride_dv, memory, seq, heads, h_k, group, start_n, first, queries, seen_lo, seen_hi,
                        scale, F, scorer, left, right, MOD, MOD_GRAD, LINEAR, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, 1)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
