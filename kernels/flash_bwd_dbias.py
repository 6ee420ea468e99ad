"""The gradient of a bias, summed over the dimensions along which the bias broadcasts. No atomics: each sum has one order.

A program owns a tile of the bias and goes through every score to which that tile was added: in all batches if the bias has one,
in all heads if it has one, and for all queries or keys along a side of length 1. It recomputes dS = P * (dP - delta) there.
Nothing of the size of the scores is stored unless the bias is of that size.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import band, dropout, score, sequence, softmax, tile
from .static import Static
from .work import Work, load_k, load_v, logits

RUN_TIME = [
    "stride_q", "stride_k", "stride_v", "stride_do", "batch", "heads", "group", "n_q", "n_k", "align", "left", "right",
    "bias_batch", "bias_heads", "bias_rows", "bias_columns",
]  # fmt: skip


@triton.jit
def _owned(index, size, all_of, SUM: tl.constexpr, BLOCK: tl.constexpr):
    """[start, stop) of the rows that tile `index` of a side goes through: its own BLOCK, or all rows along a summed side."""
    if SUM:
        return 0, all_of
    else:
        return index * BLOCK, tl.minimum(index * BLOCK + BLOCK, size)


class Inputs(NamedTuple):
    """The kernel's arguments that every head of every sequence needs."""

    Q: Any
    K: Any
    V: Any
    DO: Any
    STATS: Any
    DELTA: Any
    stride_q: Any
    stride_k: Any
    stride_v: Any
    stride_do: Any
    heads: Any
    group: Any
    n_q: Any
    left: Any
    right: Any


@triton.jit
def _ds(q, do, m, log2_l, delta, start_n, work, F, C: tl.constexpr):
    """The gradient of the logits of one tile [BLOCK_M, BLOCK_N]."""
    offs_m = work.start_m + tl.arange(0, C.BLOCK_M)
    offs_n = start_n + tl.arange(0, C.BLOCK_N)
    k = load_k(work, start_n, C, MASKED=True)
    v = load_v(work, start_n, C, MASKED=True)
    s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
    s, keep, _ = logits(s, offs_m, offs_n, start_n, work, F, C, MASKED=True)
    p = softmax.weights(s, m[:, None], log2_l[:, None], work.scorer)
    dp = tl.dot(do, tl.trans(v), input_precision=C.PRECISION)  # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_N]
    if F.dropout is not None:
        kept = dropout.keep(F.dropout, work.bh, work.start_m, start_n, C.BLOCK_M, C.BLOCK_N)
        dp = tl.where(kept, dp * F.dropout.factor, 0.0)
    return tl.where(keep, p * (dp - delta[:, None]), 0.0)


@triton.jit
def _head_sum(acc, inputs, seq, scorer, m_lo, m_hi, n_lo, n_hi, F, C: tl.constexpr, SUM_COLUMNS: tl.constexpr):
    """Add the gradients of the logits of queries [m_lo, m_hi) and keys [n_lo, n_hi), of head scorer.h of a sequence, to acc."""
    h = scorer.h
    row = (seq.at * inputs.heads + h).to(tl.int64) * inputs.n_q + seq.q_row
    stats = softmax.stats_at(inputs.STATS, seq, h, inputs.heads, inputs.n_q, C.STATS_ROWS)
    Q = tile.head(inputs.Q, inputs.stride_q, seq.at, h, seq.q_row, C.VEC)
    DO = tile.head(inputs.DO, inputs.stride_do, seq.at, h, seq.q_row, C.VEC)
    K = tile.head(inputs.K, inputs.stride_k, seq.at, h // inputs.group, seq.k_row, C.VEC)
    V = tile.head(inputs.V, inputs.stride_v, seq.at, h // inputs.group, seq.k_row, C.VEC)
    for start_m in range(m_lo, tl.minimum(m_hi, seq.n_q), C.BLOCK_M):
        end_m = tl.minimum(start_m + C.BLOCK_M, seq.n_q)
        lo, _, _, hi = band.key_range(start_m, end_m, scorer.n_k, scorer.shift, inputs.left, inputs.right, F, C.BLOCK_N)
        offs_m = start_m + tl.arange(0, C.BLOCK_M)
        q = tile.load(Q, inputs.stride_q, start_m, 0, seq.n_q, C.BLOCK_M, C.HEAD_DIM, C.BLOCK_D, C.VEC, MASKED=True)
        do = tile.load(DO, inputs.stride_do, start_m, 0, seq.n_q, C.BLOCK_M, C.HEAD_DIM_V, C.BLOCK_DV, C.VEC, MASKED=True)
        m = softmax.load_maximum(stats, offs_m, 0, seq.n_q, MASKED=True)
        log2_l = softmax.load_log2_sum(stats, offs_m, inputs.n_q, 0, seq.n_q, MASKED=True)
        delta = tile.load_row_values(inputs.DELTA + row, offs_m, 0, seq.n_q, 0.0, MASKED=True)
        first = n_lo
        if SUM_COLUMNS:
            first = band.first_tile(lo, F, C.BLOCK_N)
        else:  # the keys of this tile, or none where none of them is seen
            hi = tl.where(n_lo + C.BLOCK_N > lo, hi, 0)
        work = Work(
            K=K, stride_k=inputs.stride_k, V=V, stride_v=inputs.stride_v, start_m=start_m, lo=0, hi=hi,
            left=inputs.left, right=inputs.right, scorer=scorer, bh=seq.b * inputs.heads + h,
        )  # fmt: skip
        for start_n in tl.range(first, tl.minimum(n_hi, hi), C.BLOCK_N):
            acc += _ds(q, do, m, log2_l, delta, start_n, work, F, C)
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

    DBIAS (bias_batch, bias_heads, bias_rows, bias_columns) contiguous. Each dimension is as large as that of the scores, or 1.
    With SUM_ROWS a length of 1 stands for all queries, with SUM_COLUMNS for all keys. The rest as in flash_bwd_dq, whose DELTA
    it reads.
    """
    C: tl.constexpr = Static(
        HEAD_DIM=HEAD_DIM, HEAD_DIM_V=HEAD_DIM_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, VEC=VEC, PRECISION=PRECISION, MOD=MOD,
        LINEAR=LINEAR, MASK_VEC=MASK_VEC, STATS_ROWS=STATS_ROWS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    inputs = Inputs(
        Q=Q, K=K, V=V, DO=DO, STATS=STATS, DELTA=DELTA, stride_q=stride_q, stride_k=stride_k, stride_v=stride_v,
        stride_do=stride_do, heads=heads, group=group, n_q=n_q, left=left, right=right,
    )  # fmt: skip
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
            acc = _head_sum(acc, inputs, seq, scorer, m_lo, m_hi, n_lo, n_hi, F, C, SUM_COLUMNS)

    if SUM_ROWS:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])
    if SUM_COLUMNS:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], [BLOCK_M, BLOCK_N])
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    at = (outer.to(tl.int64) * bias_rows + rows) * bias_columns + columns
    inside = (rows < bias_rows) & (columns < bias_columns)
    tl.store(DBIAS + at, acc.to(DBIAS.dtype.element_ty), mask=inside)
