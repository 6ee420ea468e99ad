"""dQ, and the delta that the other kernels of the backward read. No atomics: the same inputs give the same bits.

A program owns a tile of queries. It forms delta = rowsum(O * dO) - dLSE, stores it for the other kernels, and sums dQ over the
keys. It recomputes P from the maximum and the sum that the forward stored of each row (Dao et al., FlashAttention, 2022).
"""

import triton
import triton.language as tl

from . import band, dropout, rounding, score, sequence, softmax, tile
from .static import Static
from .work import Work, load_k, load_v, logits

RUN_TIME = [
    "stride_q", "stride_k", "stride_v", "stride_o", "stride_do", "stride_dq", "batch", "heads", "group", "n_q", "n_k", "tiles",
    "align", "left", "right",
]  # fmt: skip


@triton.jit
def _dq_tiles(q, do, m, delta, dq, dslope, start, stop, work, F, C: tl.constexpr, MASKED: tl.constexpr):
    """Add the tiles of keys from start to stop to dq, and each query's part of the gradient of ALiBi's slope to dslope
    [BLOCK_M]. As P is not normalised here, both are too large by the factor l of their row."""
    offs_m = work.start_m + tl.arange(0, C.BLOCK_M)
    for start_n in tl.range(start, stop, C.BLOCK_N):
        offs_n = start_n + tl.arange(0, C.BLOCK_N)
        k = load_k(work, start_n, C, MASKED)
        v = load_v(work, start_n, C, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
        s, keep, slope = logits(s, offs_m, offs_n, start_n, work, F, C, MASKED)
        p = softmax.unnormalised(s, m[:, None], work.scorer)
        dp = tl.dot(do, tl.trans(v), input_precision=C.PRECISION)  # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_N]
        if F.dropout is not None:
            kept = dropout.keep(F.dropout, work.bh, work.start_m, start_n, C.BLOCK_M, C.BLOCK_N)
            dp = tl.where(kept, dp * F.dropout.factor, 0.0)
        ds = tl.where(keep, p * (dp - delta[:, None]), 0.0)
        if F.slopes is not None:
            dslope -= tl.sum(ds * score.distance(offs_m[:, None], offs_n[None, :], work.scorer), 1)
        if F.softcap is not None or C.MOD is not None:
            ds = tl.where(keep, ds * slope, 0.0)
        k = score.hide_unseen(k, keep, F, 0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=C.PRECISION)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    return dq, dslope


@triton.jit(do_not_specialize=RUN_TIME)
def flash_bwd_dq(
    Q, K, V, O, DO, STATS, DLSE, DELTA, DQ, DSLOPES, F, stride_q, stride_k, stride_v, stride_o, stride_do, stride_dq,
    batch, heads, group, n_q, n_k, tiles, scale, align, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, MOD: tl.constexpr, MOD_GRAD: tl.constexpr, LINEAR: tl.constexpr, MASK_VEC: tl.constexpr,
    STATS_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid as in flash_fwd. Writes DQ, DELTA, and with slopes DSLOPES: each query's part of their gradient.

    Shapes as in flash_fwd; DO as O, DQ as Q; DLSE, DELTA and DSLOPES (B, heads, n_q) fp32 contiguous. DLSE may be None.
    """
    C: tl.constexpr = Static(
        HEAD_DIM=HEAD_DIM, HEAD_DIM_V=HEAD_DIM_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, VEC=VEC, PRECISION=PRECISION, MOD=MOD,
        MOD_GRAD=MOD_GRAD, LINEAR=LINEAR, MASK_VEC=MASK_VEC, STATS_ROWS=STATS_ROWS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    seq, h, start_m = sequence.locate_queries(F, tl.program_id(0), tiles, heads, batch, n_q, n_k, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    shift = align * (seq.n_k - seq.n_q)
    scale = score.scale_of(F, scale)
    scorer = score.prepare(F, seq, h, scale, shift, C)
    end_m = tl.minimum(start_m + BLOCK_M, seq.n_q)
    lo, full_lo, full_hi, hi = band.key_range(start_m, end_m, scorer.n_k, shift, left, right, F, BLOCK_N)

    row = (seq.at * heads + h).to(tl.int64) * n_q + seq.q_row
    in_rows = offs_m < seq.n_q
    Q_h = tile.head(Q, stride_q, seq.at, h, seq.q_row, VEC)
    O_h = tile.head(O, stride_o, seq.at, h, seq.q_row, VEC)
    DO_h = tile.head(DO, stride_do, seq.at, h, seq.q_row, VEC)
    q = tile.load(Q_h, stride_q, start_m, 0, seq.n_q, BLOCK_M, HEAD_DIM, BLOCK_D, VEC, MASKED=True)
    o = tile.load(O_h, stride_o, start_m, 0, seq.n_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV, VEC, MASKED=True)
    do = tile.load(DO_h, stride_do, start_m, 0, seq.n_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV, VEC, MASKED=True)
    delta = softmax.delta(o, do, F)
    if STATS_ROWS > 2:
        lost = rounding.load(STATS, O, seq, h, heads, n_q, start_m, C)
        delta += softmax.delta(lost, do, F)
    if DLSE is not None:
        delta -= tl.load(DLSE + row + offs_m, mask=in_rows, other=0.0)  # d lse / d s = p, so its gradient joins delta
    tl.store(DELTA + row + offs_m, delta, mask=in_rows)
    stats = softmax.stats_at(STATS, seq, h, heads, n_q, STATS_ROWS)
    m = softmax.load_maximum(stats, offs_m, 0, seq.n_q, MASKED=True)
    factor = tl.math.exp2(-softmax.load_log2_sum(stats, offs_m, n_q, 0, seq.n_q, MASKED=True))  # 1 / l

    work = Work(
        K=tile.head(K, stride_k, seq.at, h // group, seq.k_row, VEC), stride_k=stride_k,
        V=tile.head(V, stride_v, seq.at, h // group, seq.k_row, VEC), stride_v=stride_v,
        start_m=start_m, lo=lo, hi=hi, left=left, right=right, scorer=scorer, bh=seq.b * heads + h,
    )  # fmt: skip
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    starts, stops = band.parts(band.first_tile(lo, F, BLOCK_N), full_lo, full_hi, hi)
    for PART in tl.static_range(3):  # before, in and behind the full tiles
        if PART > 0 or left is not None:
            dq, dslope = _dq_tiles(q, do, m, delta, dq, dslope, starts[PART], stops[PART], work, F, C, MASKED=PART != 1)
    DQ_h = tile.head(DQ, stride_dq, seq.at, h, seq.q_row, VEC)
    tile.store(DQ_h, stride_dq, start_m, seq.n_q, dq * (factor * scale)[:, None], BLOCK_M, HEAD_DIM, BLOCK_D, VEC)
    if DSLOPES is not None:
        tl.store(DSLOPES + row + offs_m, dslope * factor, mask=in_rows)
