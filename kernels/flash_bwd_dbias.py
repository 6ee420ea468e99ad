"""The gradient of a bias, summed over the dimensions that the bias broadcasts along, without atomics.

A program owns a tile of the bias itself and goes through every score that it was added to: all batches where the bias has one,
all heads, and all queries or keys along a side of length 1. It recomputes dS = P * (dP - delta) there. Nothing of the size of
the scores is stored unless the bias is of that size, and each sum has one order.
"""

import triton
import triton.language as tl

from . import band, dropout, score, sequence, softmax, tile
from .static import Static

RUN_TIME = [
    "stride_q", "stride_k", "stride_v", "stride_do", "batch", "heads", "group", "n_q", "n_k", "align", "left", "right",
    "bias_batch", "bias_heads", "bias_rows", "bias_columns",
]  # fmt: skip


@triton.jit
def _owned(index, size, all_of, SUM: tl.constexpr, BLOCK: tl.constexpr):
    """[start, stop) that tile `index` of a side goes through: its own BLOCK, or all there is along a summed side."""
    if SUM:
        return 0, all_of
    else:
        return index * BLOCK, tl.minimum(index * BLOCK + BLOCK, size)


@triton.jit
def _ds(
    q, do, m, log2_l, delta, K, V, stride_k, stride_v, start_m, start_n, hi, left, right, F, scorer, bh,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
    MOD: tl.constexpr, LINEAR: tl.constexpr, MASK_VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits of one tile [BLOCK_M, BLOCK_N]."""
    C: tl.constexpr = Static(MOD=MOD, LINEAR=LINEAR, MASK_VEC=MASK_VEC)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = tile.load(K, stride_k, start_n, 0, hi, BLOCK_N, HEAD_DIM, BLOCK_D, VEC, True)
    v = tile.load(V, stride_v, start_n, 0, hi, BLOCK_N, HEAD_DIM_V, BLOCK_DV, VEC, True)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
    s, keep, _ = score.logits(s, offs_m[:, None], offs_n[None, :], start_m, start_n, F, scorer, left, right, C, True, True)
    p = softmax.weights(s, m[:, None], log2_l[:, None], scorer)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_N]
    if F.dropout is not None:
        kept = dropout.keep(F.dropout, bh, start_m, start_n, BLOCK_M, BLOCK_N)
        dp = tl.where(kept, dp * F.dropout.factor, 0.0)
    return tl.where(keep, p * (dp - delta[:, None]), 0.0)


@triton.jit
def _head_sum(
    acc, Q, K, V, DO, STATS, DELTA, left, right, F, scorer, seq, stride_q, stride_k, stride_v, stride_do,
    m_lo, m_hi, n_lo, n_hi, heads, group, n_q,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
    MOD: tl.constexpr, LINEAR: tl.constexpr, MASK_VEC: tl.constexpr, STATS_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the scores of queries [m_lo, m_hi) and keys [n_lo, n_hi) of head scorer.h of a sequence to acc."""
    row = (seq.at * heads + scorer.h).to(tl.int64) * n_q + seq.q_row
    stats = softmax.stats_at(STATS, seq, scorer.h, heads, n_q, STATS_ROWS)
    Q_h = tile.head(Q, stride_q, seq.at, scorer.h, seq.q_row, VEC)
    DO_h = tile.head(DO, stride_do, seq.at, scorer.h, seq.q_row, VEC)
    K_h = tile.head(K, stride_k, seq.at, scorer.h // group, seq.k_row, VEC)
    V_h = tile.head(V, stride_v, seq.at, scorer.h // group, seq.k_row, VEC)
    for start_m in range(m_lo, tl.minimum(m_hi, seq.n_q), BLOCK_M):
        end_m = tl.minimum(start_m + BLOCK_M, seq.n_q)
        lo, _, _, hi = band.key_range(start_m, end_m, scorer.n_k, scorer.shift, left, right, F, BLOCK_N)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = tile.load(Q_h, stride_q, start_m, 0, seq.n_q, BLOCK_M, HEAD_DIM, BLOCK_D, VEC, True)
        do = tile.load(DO_h, stride_do, start_m, 0, seq.n_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV, VEC, True)
        m = softmax.load_maximum(stats, offs_m, 0, seq.n_q, True)
        log2_l = softmax.load_log2_sum(stats, offs_m, n_q, 0, seq.n_q, True)
        delta = tile.load_row_values(DELTA + row, offs_m, 0, seq.n_q, 0.0, True)
        first = n_lo
        if SUM_COLUMNS:
            first = band.first_tile(lo, F, BLOCK_N)
        else:  # this tile of columns, or none of it
            hi = tl.where(n_lo + BLOCK_N > lo, hi, 0)
        for start_n in tl.range(first, tl.minimum(n_hi, hi), BLOCK_N):
            acc += _ds(
                q, do, m, log2_l, delta, K_h, V_h, stride_k, stride_v, start_m, start_n, hi, left, right, F, scorer,
                seq.b * heads + scorer.h, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, VEC, PRECISION, MOD,
                LINEAR,
                MASK_VEC)  # fmt: skip
    return acc


@triton.jit(do_not_specialize=RUN_TIME)
def flash_bwd_dbias(
    Q, K, V, DO, STATS, DELTA, DBIAS, F, stride_q, stride_k, stride_v, stride_do, batch, heads, group, n_q, n_k,
    scale, align, left, right, bias_batch, bias_heads, bias_rows, bias_columns,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, MOD: tl.constexpr, LINEAR: tl.constexpr, MASK_VEC: tl.constexpr,
    STATS_ROWS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (bias_batch * bias_heads * ceil(bias_rows / BLOCK_M) * ceil(bias_columns / BLOCK_N),).

    DBIAS (bias_batch, bias_heads, bias_rows, bias_columns) contiguous, each dim as large as the scores' or 1; the sides of
    length 1 that stand for all queries or keys are SUM_ROWS and SUM_COLUMNS. The rest as in flash_bwd_dq, whose DELTA it reads.
    """
    C: tl.constexpr = Static(LINEAR=LINEAR, MASK_VEC=MASK_VEC)
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(bias_columns, BLOCK_N)
    tiles_m = tl.cdiv(bias_rows, BLOCK_M)
    tile_n = pid % tiles_n
    tile_m = pid // tiles_n % tiles_m
    outer = pid // (tiles_n * tiles_m)
    scale = score.scale_of(F, scale)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_b = outer // bias_heads
    bias_h = outer % bias_heads
    for b in range(bias_b, tl.where(bias_batch == 1, batch, bias_b + 1)):
        seq = sequence.of_batch(F, b, batch, n_q, n_k)
        m_lo, m_hi = _owned(tile_m, bias_rows, seq.n_q, SUM_ROWS, BLOCK_M)
        n_lo, n_hi = _owned(tile_n, bias_columns, seq.n_k, SUM_COLUMNS, BLOCK_N)
        for h in range(bias_h, tl.where(bias_heads == 1, heads, bias_h + 1)):
            scorer = score.prepare(F, seq, h, scale, align * (seq.n_k - seq.n_q), C)
            acc = _head_sum(
                acc, Q, K, V, DO, STATS, DELTA, left, right, F, scorer, seq, stride_q, stride_k, stride_v, stride_do,
                m_lo, m_hi, n_lo, n_hi, heads, group, n_q, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                VEC, PRECISION, MOD, LINEAR, MASK_VEC, STATS_ROWS, SUM_COLUMNS)  # fmt: skip

    if SUM_ROWS:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])
    if SUM_COLUMNS:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], [BLOCK_M, BLOCK_N])
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    at = (outer.to(tl.int64) * bias_rows + rows) * bias_columns + columns
    inside = (rows < bias_rows) & (columns < bias_columns)
    tl.store(DBIAS + at, acc.to(DBIAS.dtype.element_ty), mask=inside)
