"""dQ for Hopper, and the deltas that flash_bwd_dkdv reads. No atomics: the same inputs give the same bits.

A producer fetches tiles by TMA, each of one or two consumer warpgroups owns BLOCK_M = 64 queries. A consumer forms their delta
once; then it issues S_j = Q K_j^T, dP_j = dO V_j^T and dQ += dS_{j-1} K_{j-1} together, and takes P_j = exp2(c S_j - lse) under
the last two. Which keys a query sees is as in kernels/band.py.
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
from .parts import accumulator, barriers, stage_of, tma_load, tma_store, zero_rows

# Changing these numbers never recompiles.
RUN_TIME = ["heads", "group", "n_q", "n_k", "tiles", "align", "LEFT", "RIGHT"]


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, o_desc, do_desc, memory, b, h, h_kv, start_m, lo, hi, n_k,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Fetch Q, O and dO once, then K and V of every tile of [lo, hi) as their buffers fall free. Rows beyond a tensor arrive as
    zeros; keys of the last tile that are there, but that no query here sees, are zeroed."""
    qs, os, dos, ks, vs, rows_full, full, empty, cut = memory
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(rows_full.index(c), 3 * q_desc.block_type.nbytes)
        tma_load(o_desc, [b, h, start_m + c * BLOCK_M, 0], rows_full.index(c), os.index(c))
        tma_load(do_desc, [b, h, start_m + c * BLOCK_M, 0], rows_full.index(c), dos.index(c))
        tma_load(q_desc, [b, h, start_m + c * BLOCK_M, 0], rows_full.index(c), qs.index(c))
    for i in range(gl.cdiv(hi - lo, BLOCK_N)):
        stage, phase = stage_of(i, STAGES)
        start_n = lo + i * BLOCK_N
        mbarrier.wait(empty.index(stage), phase ^ 1)
        if gl.minimum(start_n + BLOCK_N, n_k) > hi:
            mbarrier.expect(cut.index(0), 2 * k_desc.block_type.nbytes)
            tma_load(k_desc, [b, h_kv, start_n, 0], cut.index(0), ks.index(stage))
            tma_load(v_desc, [b, h_kv, start_n, 0], cut.index(0), vs.index(stage))
            mbarrier.wait(cut.index(0), 0)
            zero_rows(ks.index(stage).reshape([BLOCK_N, D]), 0, hi - start_n, BLOCK_N)
            zero_rows(vs.index(stage).reshape([BLOCK_N, D]), 0, hi - start_n, BLOCK_N)
            fence_async_shared()
            mbarrier.arrive(full.index(stage), count=1)
        else:
            mbarrier.expect(full.index(stage), 2 * k_desc.block_type.nbytes)
            tma_load(k_desc, [b, h_kv, start_n, 0], full.index(stage), ks.index(stage))
            tma_load(v_desc, [b, h_kv, start_n, 0], full.index(stage), vs.index(stage))


@gluon.jit
def _step(
    i, q, do, memory, dq, ds, lse, delta, start_m, lo, n_tiles, S, LEFT, RIGHT, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dS of tile i, and the product of the tile before it, whose dS is ds."""
    _qs, _os, _dos, ks, vs, _rows_full, full, empty, _cut = memory
    stage, phase = stage_of(i, STAGES)
    before, _ = stage_of(i - 1, STAGES)
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    IN_FLIGHT: gl.constexpr = 1 if FIRST else 2
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    k = ks.index(stage).reshape([BLOCK_N, D])
    v = vs.index(stage).reshape([BLOCK_N, D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, D] @ [D, BLOCK_N]
    dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, D] @ [D, BLOCK_N]
    if not FIRST:
        dq = warpgroup_mma(ds, ks.index(before).reshape([BLOCK_N, D]), dq, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, D]
    s = warpgroup_mma_wait(IN_FLIGHT, deps=(s,))
    if MASKED:
        offs_m = start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, S_LAYOUT))
        offs_n = lo + i * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(band.visible(offs_m[:, None], offs_n[None, :], S.n_k, S.shift, LEFT, RIGHT), s, float("-inf"))
    p = softmax.weights(s, lse[:, None], S, True)
    # A real branch: without one ptxas moves the wait below above the exponentials, and nothing overlaps.
    ahead, phase_ahead = stage_of(i + 1, STAGES)
    mbarrier.wait(full.index(ahead), phase_ahead, pred=i + 1 < n_tiles)
    dp, p = warpgroup_mma_wait(IN_FLIGHT - 1, deps=(dp, p))
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(D), k_width=2)
    following = gl.convert_layout((p * (dp - delta[:, None])).to(ks.dtype), A_LAYOUT)
    if not FIRST:
        mbarrier.wait(full.index(stage), phase)  # passed long ago, but a branch
        dq, following = warpgroup_mma_wait(0, deps=(dq, following))
        mbarrier.arrive(empty.index(before), count=1)
    return dq, following


@gluon.jit
def _consume(
    dq_desc, LSE, DLSE, DELTA, F, memory, b, h, start_m, lo, full_lo, full_hi, hi, S, row, n_q, LEFT, RIGHT,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """All of 64 queries: dQ and DELTA."""
    qs, os, dos, ks, _vs, rows_full, full, _empty, _cut = memory
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    D_LAYOUT: gl.constexpr = accumulator(D)
    start_m += CONSUMER * BLOCK_M
    n_tiles = gl.cdiv(gl.maximum(hi - lo, 0), BLOCK_N)
    q = qs.index(CONSUMER).reshape([BLOCK_M, D])
    do = dos.index(CONSUMER).reshape([BLOCK_M, D])
    offs_m = start_m + gl.arange(0, BLOCK_M, layout=ROWS)
    lse = softmax.load_lse(LSE + row, offs_m, 0, n_q, True, True)
    mbarrier.wait(rows_full.index(CONSUMER), 0)
    if D <= 64:
        A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_N), k_width=2)
        q_a = q.load(A)
        do_a = do.load(A)
    else:
        q_a = q
        do_a = do
    delta = softmax.delta(os.index(CONSUMER).reshape([BLOCK_M, D]).load(D_LAYOUT), do.load(D_LAYOUT), F)
    delta = gl.convert_layout(delta, ROWS, assert_trivial=True)
    if DLSE is not None:
        delta -= gl.load(DLSE + row + offs_m, mask=offs_m < n_q, other=0.0)
    gl.store(DELTA + row + offs_m, delta, mask=offs_m < n_q)
    dq = gl.zeros([BLOCK_M, D], gl.float32, D_LAYOUT)
    if n_tiles > 0:
        ds = gl.zeros([BLOCK_M, BLOCK_N], ks.dtype, gl.DotOperandLayout(operand_index=0, parent=D_LAYOUT, k_width=2))
        mbarrier.wait(full.index(0), 0)
        dq, ds = _step(0, q_a, do_a, memory, dq, ds, lse, delta, start_m, lo, n_tiles, S, LEFT, RIGHT,
                       BLOCK_M, BLOCK_N, D, STAGES, True, True)  # fmt: skip
        left = gl.minimum((full_lo - lo) // BLOCK_N, n_tiles)
        right = gl.minimum(gl.maximum((full_hi - lo) // BLOCK_N, left), n_tiles)
        if LEFT is not None:
            for i in range(1, left):
                dq, ds = _step(i, q_a, do_a, memory, dq, ds, lse, delta, start_m, lo, n_tiles, S, LEFT, RIGHT,
                               BLOCK_M, BLOCK_N, D, STAGES, False, True)  # fmt: skip
        for i in range(gl.maximum(left, 1), right):
            dq, ds = _step(i, q_a, do_a, memory, dq, ds, lse, delta, start_m, lo, n_tiles, S, LEFT, RIGHT,
                           BLOCK_M, BLOCK_N, D, STAGES, False, False)  # fmt: skip
        for i in range(gl.maximum(right, 1), n_tiles):
            dq, ds = _step(i, q_a, do_a, memory, dq, ds, lse, delta, start_m, lo, n_tiles, S, LEFT, RIGHT,
                           BLOCK_M, BLOCK_N, D, STAGES, False, True)  # fmt: skip
        last, _ = stage_of(n_tiles - 1, STAGES)
        dq = warpgroup_mma(ds, ks.index(last).reshape([BLOCK_N, D]), dq, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, D]
        dq = warpgroup_mma_wait(0, deps=(dq,))
    # What sees no key may have been NaN, in its own row alone. dQ leaves through the memory of Q.
    live = gl.convert_layout(lse, gl.SliceLayout(1, D_LAYOUT), assert_trivial=True)[:, None] < float("inf")
    q.store(gl.where(live, dq * S.scale, 0.0).to(q.dtype))
    fence_async_shared()
    tma_store(dq_desc, [b, h, start_m, 0], qs.index(CONSUMER))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_bwd_dq(
    q_desc, k_desc, v_desc, o_desc, do_desc, dq_desc, LSE, DLSE, DELTA, F, heads, group, n_q, n_k, tiles, scale, align,
    LEFT, RIGHT, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid, descriptors and F as in flash_fwd; those of dO and dQ as Q's. Writes dQ and DELTA = rowsum(O * dO) - DLSE.

    LSE, DLSE, DELTA (B, heads, n_q) fp32 contiguous. DLSE may be None.
    """
    gl.static_assert(STAGES >= 3, "the next tile is waited for before the one before is free")
    seq, h, start_m = sequence.locate_queries(F, gl.program_id(0), tiles, heads, 0, n_q, n_k, BLOCK_M * CONSUMERS)
    b, shift = seq.b, align * (seq.n_k - n_q)
    S = score.prepare(F, seq, h, scale, shift, True, 0)
    end_m = gl.minimum(start_m + BLOCK_M * CONSUMERS, n_q)
    lo, full_lo, full_hi, hi = band.key_range(start_m, end_m, seq.n_k, shift, LEFT, RIGHT, F, BLOCK_N)
    qs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, D], q_desc.layout)
    os = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, D], o_desc.layout)
    dos = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, D], do_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    rows_full, full, empty, cut = barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, CONSUMERS), barriers(1, 1)
    fence_async_shared()  # for the barriers
    row = (b * heads + h).to(gl.int64) * n_q
    memory = (qs, os, dos, ks, vs, rows_full, full, empty, cut)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, o_desc, do_desc, memory, b, h, h // group, start_m, lo, hi, n_k,
                        BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS)),
            (_consume, (dq_desc, LSE, DLSE, DELTA, F, memory, b, h, start_m, lo, full_lo, full_hi, hi, S, row, n_q,
                        LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, 0)),
        ], [4], [REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, o_desc, do_desc, memory, b, h, h // group, start_m, lo, hi, n_k,
                        BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS)),
            (_consume, (dq_desc, LSE, DLSE, DELTA, F, memory, b, h, start_m, lo, full_lo, full_hi, hi, S, row, n_q,
                        LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, 0)),
            (_consume, (dq_desc, LSE, DLSE, DELTA, F, memory, b, h, start_m, lo, full_lo, full_hi, hi, S, row, n_q,
                        LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, 1)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
