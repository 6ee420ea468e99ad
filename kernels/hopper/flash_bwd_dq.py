"""dQ for Hopper, and the deltas that flash_bwd_dkdv reads. No atomics: the same inputs give the same bits.

A producer fetches tiles by TMA, each of one or two consumer warpgroups owns BLOCK_M = 64 queries. A consumer forms their delta
once; then it issues S_j = Q K_j^T, dP_j = dO V_j^T and dQ += dS_{j-1} K_{j-1} together, and forms P_j under the last two. Which
keys a query sees is as in kernels/band.py.
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

from .. import band, score, sequence, softmax
from ..static import Static
from .parts import accumulator, barriers, load_rows, stage_of, store_rows, survivors, tma_load, tma_store

# Changing these numbers never recompiles.
RUN_TIME = ["stride_dq", "batch", "heads", "group", "n_q", "n_k", "tiles", "align", "left", "right"]


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, o_desc, do_desc, memory, seq, h, h_kv, start_m, first, lo, hi, n_k,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Fetch Q, O and dO once, then K and V of every tile from `first` to hi as their buffers fall free."""
    qs, os, dos, ks, vs, rows_full, full, empty, cut = memory
    for c in gl.static_range(CONSUMERS):
        at = [seq.at, h, seq.q_row + start_m + c * BLOCK_M, 0]
        mbarrier.expect(rows_full.index(c), 3 * q_desc.block_type.nbytes)
        tma_load(o_desc, at, rows_full.index(c), os.index(c))
        tma_load(do_desc, at, rows_full.index(c), dos.index(c))
        tma_load(q_desc, at, rows_full.index(c), qs.index(c))
    cuts = 0
    for i in range(gl.cdiv(hi - first, BLOCK_N)):
        stage, phase = stage_of(i, STAGES)
        start_n = first + i * BLOCK_N
        mbarrier.wait(empty.index(stage), phase ^ 1)
        cuts = load_rows(
            k_desc, v_desc, [seq.at, h_kv, seq.k_row + start_n, 0], ks.index(stage), vs.index(stage), full.index(stage),
            cut.index(0), cuts, lo - start_n, hi - start_n, n_k, BLOCK_N, BLOCK_D)  # fmt: skip


@gluon.jit
def _step(
    i, q, do, memory, dq, ds, dslope, m, log2_l, delta, bh, start_m, first, n_tiles, F, scorer, left, right, MOD: gl.constexpr,
    MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dS of tile i, and the product of the tile before it, whose dS is ds."""
    _qs, _os, _dos, ks, vs, _rows_full, full, empty, _cut = memory
    stage, phase = stage_of(i, STAGES)
    before, _ = stage_of(i - 1, STAGES)
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    IN_FLIGHT: gl.constexpr = 1 if FIRST else 2
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    k = ks.index(stage).reshape([BLOCK_N, BLOCK_D])
    v = vs.index(stage).reshape([BLOCK_N, BLOCK_D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
    dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
    if not FIRST:
        dq = warpgroup_mma(
            ds, ks.index(before).reshape([BLOCK_N, BLOCK_D]), dq, is_async=True
        )  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    s = warpgroup_mma_wait(IN_FLIGHT, deps=(s,))
    start_n = first + i * BLOCK_N
    offs_m = start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, S_LAYOUT))
    offs_n = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    C: gl.constexpr = Static(MOD=MOD, MOD_GRAD=MOD_GRAD, LINEAR=LINEAR, MASK_VEC=0)
    s, keep, slope = score.logits(
        s, offs_m[:, None], offs_n[None, :], start_m, start_n, F, scorer, left, right, C, MASKED, MASKED)  # fmt: skip
    p = softmax.weights(gl.where(keep, s, float("-inf")), m[:, None], log2_l[:, None], scorer)
    if F.dropout is not None:
        kept = survivors(F.dropout, bh, start_m, start_n, p)
    # A real branch: without one ptxas moves the wait below above the exponentials, and nothing overlaps.
    ahead, phase_ahead = stage_of(i + 1, STAGES)
    mbarrier.wait(full.index(ahead), phase_ahead, pred=i + 1 < n_tiles)
    dp, p = warpgroup_mma_wait(IN_FLIGHT - 1, deps=(dp, p))
    if F.dropout is not None:
        dp = gl.where(kept, dp * F.dropout.factor, 0.0)
    x = p * (dp - delta[:, None])
    if F.slopes is not None:
        dslope -= gl.sum(x * score.distance(offs_m[:, None], offs_n[None, :], scorer), 1)
    if F.softcap is not None or MOD is not None:
        x = x * slope
    if F.softcap is not None or MOD is not None or F.sinks is not None:  # slope may be NaN; and a sink is a maximum
        x = gl.where(keep, x, 0.0)
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_D), k_width=2)
    following = gl.convert_layout(x.to(ks.dtype), A_LAYOUT)
    if not FIRST:
        mbarrier.wait(full.index(stage), phase)  # passed long ago, but a branch
        dq, following = warpgroup_mma_wait(0, deps=(dq, following))
        mbarrier.arrive(empty.index(before), count=1)
    return dq, following, dslope


@gluon.jit
def _sum(
    q, do, memory, dq, dslope, m, log2_l, delta, bh, start_m, first, keys, F, scorer, left, right, MOD: gl.constexpr,
    MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dq and dslope over all tiles of keys, of which there is one at least."""
    _qs, _os, _dos, ks, _vs, _rows_full, full, _empty, _cut = memory
    _lo, full_lo, full_hi, hi = keys
    n_tiles = gl.cdiv(hi - first, BLOCK_N)
    ds = gl.zeros([BLOCK_M, BLOCK_N], ks.dtype, gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_D), k_width=2))
    mbarrier.wait(full.index(0), 0)
    dq, ds, dslope = _step(
        0, q, do, memory, dq, ds, dslope, m, log2_l, delta, bh, start_m, first, n_tiles, F, scorer, left, right,
        MOD, MOD_GRAD, LINEAR, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, True, True)  # fmt: skip
    full_begin = gl.minimum((full_lo - first) // BLOCK_N, n_tiles)
    full_end = gl.minimum(gl.maximum((full_hi - first) // BLOCK_N, full_begin), n_tiles)
    if left is not None:
        for i in range(1, full_begin):
            dq, ds, dslope = _step(
                i, q, do, memory, dq, ds, dslope, m, log2_l, delta, bh, start_m, first, n_tiles, F, scorer, left, right,
                MOD, MOD_GRAD, LINEAR, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, False, True)  # fmt: skip
    for i in range(gl.maximum(full_begin, 1), full_end):
        dq, ds, dslope = _step(
            i, q, do, memory, dq, ds, dslope, m, log2_l, delta, bh, start_m, first, n_tiles, F, scorer, left, right,
            MOD, MOD_GRAD, LINEAR, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, False, False)  # fmt: skip
    for i in range(gl.maximum(full_end, 1), n_tiles):
        dq, ds, dslope = _step(
            i, q, do, memory, dq, ds, dslope, m, log2_l, delta, bh, start_m, first, n_tiles, F, scorer, left, right,
            MOD, MOD_GRAD, LINEAR, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, False, True)  # fmt: skip
    last, _ = stage_of(n_tiles - 1, STAGES)
    dq = warpgroup_mma(
        ds, ks.index(last).reshape([BLOCK_N, BLOCK_D]), dq, is_async=True
    )  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    dq = warpgroup_mma_wait(0, deps=(dq,))
    return dq, dslope


@gluon.jit
def _consume(
    dq_desc, DQ, STATS, DLSE, DELTA, DSLOPES, stride_dq, F, memory, seq, h, heads, start_m, first, keys, scorer, n_q, left,
    right,
    MOD: gl.constexpr, MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """All of 64 queries: dQ, DELTA, DSLOPES."""
    qs, os, dos, _ks, _vs, rows_full, _full, _empty, _cut = memory
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    D_LAYOUT: gl.constexpr = accumulator(BLOCK_D)
    start_m += CONSUMER * BLOCK_M
    q = qs.index(CONSUMER).reshape([BLOCK_M, BLOCK_D])
    do = dos.index(CONSUMER).reshape([BLOCK_M, BLOCK_D])
    offs_m = start_m + gl.arange(0, BLOCK_M, layout=ROWS)
    there = offs_m < seq.n_q
    row = (seq.at * heads + h).to(gl.int64) * n_q + seq.q_row
    stats = softmax.stats_at(STATS, seq, h, heads, n_q, 2)
    m = softmax.load_maximum(stats, offs_m, 0, seq.n_q, True)
    log2_l = softmax.load_log2_sum(stats, offs_m, n_q, 0, seq.n_q, True)
    mbarrier.wait(rows_full.index(CONSUMER), 0)
    if BLOCK_D <= 64:
        A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_N), k_width=2)
        q_a = q.load(A)
        do_a = do.load(A)
    else:
        q_a = q
        do_a = do
    delta = softmax.delta(os.index(CONSUMER).reshape([BLOCK_M, BLOCK_D]).load(D_LAYOUT), do.load(D_LAYOUT), F)
    delta = gl.convert_layout(delta, ROWS, assert_trivial=True)
    if DLSE is not None:
        delta -= gl.load(DLSE + row + offs_m, mask=there, other=0.0)
    gl.store(DELTA + row + offs_m, delta, mask=there)
    dq = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, D_LAYOUT)
    dslope = gl.zeros([BLOCK_M], gl.float32, ROWS)
    if keys[3] > first:
        dq, dslope = _sum(
            q_a, do_a, memory, dq, dslope, m, log2_l, delta, seq.b * heads + h, start_m, first, keys, F, scorer, left, right,
            MOD, MOD_GRAD, LINEAR, BLOCK_M, BLOCK_N, BLOCK_D, STAGES)  # fmt: skip
    # What sees no key may have been NaN, in its own row alone. dQ leaves through the memory of Q.
    live = log2_l < float("inf")
    if DSLOPES is not None:
        gl.store(DSLOPES + row + offs_m, gl.where(live, dslope, 0.0), mask=there)
    live = gl.convert_layout(live, gl.SliceLayout(1, D_LAYOUT), assert_trivial=True)[:, None]
    dq = gl.where(live, dq * scorer.scale, 0.0).to(q.dtype)
    if F.cu_q is None:
        q.store(dq)
        fence_async_shared()
        tma_store(dq_desc, [seq.at, h, start_m, 0], qs.index(CONSUMER))
        tma.store_wait(0)
    else:
        store_rows(dq, DQ, stride_dq, seq.at, h, seq.q_row + start_m, seq.n_q - start_m, HEAD_DIM)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_bwd_dq(
    q_desc, k_desc, v_desc, o_desc, do_desc, dq_desc, DQ, STATS, DLSE, DELTA, DSLOPES, F, stride_dq, batch, heads, group, n_q,
    n_k, tiles, scale, align, left, right, MOD: gl.constexpr, MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (items,), and all arguments, as in flash_fwd; descriptors of dO and dQ as Q's, and dQ again, with its strides.
    Writes dQ, DELTA = rowsum(O * dO) - DLSE, and with slopes DSLOPES: each query's part of their gradient.

    DLSE, DELTA, DSLOPES (B, heads, n_q) fp32 contiguous. DLSE and DSLOPES may be None.
    """
    gl.static_assert(STAGES >= 3, "the next tile is waited for before the one before is free")
    C: gl.constexpr = Static(LINEAR=LINEAR, MASK_VEC=0)
    seq, h, start_m = sequence.locate_queries(F, gl.program_id(0), tiles, heads, batch, n_q, n_k, BLOCK_M * CONSUMERS)
    shift = align * (seq.n_k - seq.n_q)
    scorer = score.prepare(F, seq, h, scale, shift, C)
    end_m = gl.minimum(start_m + BLOCK_M * CONSUMERS, seq.n_q)
    keys = band.key_range(start_m, end_m, scorer.n_k, shift, left, right, F, BLOCK_N)
    first = band.first_tile(keys[0], F, BLOCK_N)
    qs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    os = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, BLOCK_D], o_desc.layout)
    dos = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, BLOCK_D], do_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    rows_full, full, empty, cut = barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, CONSUMERS), barriers(1, 1)
    fence_async_shared()  # for the barriers
    memory = (qs, os, dos, ks, vs, rows_full, full, empty, cut)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, o_desc, do_desc, memory, seq, h, h // group, start_m, first, keys[0], keys[3],
                        n_k, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS)),
            (_consume, (dq_desc, DQ, STATS, DLSE, DELTA, DSLOPES, stride_dq, F, memory, seq, h, heads, start_m, first, keys,
            scorer,
                        n_q, left, right, MOD, MOD_GRAD, LINEAR, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, 0)),
        ], [4], [REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, o_desc, do_desc, memory, seq, h, h // group, start_m, first, keys[0], keys[3],
                        n_k, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS)),
            (_consume, (dq_desc, DQ, STATS, DLSE, DELTA, DSLOPES, stride_dq, F, memory, seq, h, heads, start_m, first, keys,
            scorer,
                        n_q, left, right, MOD, MOD_GRAD, LINEAR, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, 0)),
            (_consume, (dq_desc, DQ, STATS, DLSE, DELTA, DSLOPES, stride_dq, F, memory, seq, h, heads, start_m, first, keys,
            scorer,
                        n_q, left, right, MOD, MOD_GRAD, LINEAR, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, 1)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
