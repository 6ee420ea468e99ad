"""Forward: O = softmax(logits(Q K^T)) V for one tile of queries, keys streamed past it (Dao et al., FlashAttention, 2022)."""

import triton
import triton.language as tl

from . import band, dropout, rounding, score, sequence, softmax, tile
from .static import Static

# Changing these numbers never recompiles; what does recompile is dtype, head dim, VEC and which arguments are None.
RUN_TIME = [
    "stride_q", "stride_k", "stride_v", "stride_o", "batch", "heads", "group", "n_q", "n_k", "tiles", "align", "left", "right",
]  # fmt: skip


@triton.jit
def _attend(
    q, K, V, stride_k, stride_v, acc, m_i, l_i, start, stop, lo, hi, start_m, left, right, F, scorer, bh,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
    MOD: tl.constexpr, LINEAR: tl.constexpr, MASK_VEC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the key tiles of [start, stop) into (acc, m_i, l_i)."""
    C: tl.constexpr = Static(MOD=MOD, LINEAR=LINEAR, MASK_VEC=MASK_VEC)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    for start_n in tl.range(start, stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = tile.load(K, stride_k, start_n, lo, hi, BLOCK_N, HEAD_DIM, BLOCK_D, VEC, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
        s, keep, _ = score.logits(
            s, offs_m[:, None], offs_n[None, :], start_m, start_n, F, scorer, left, right, C, MASKED, MASKED)  # fmt: skip
        s = tl.where(keep, s, float("-inf"))
        p, alpha, m_i, l_i = softmax.step(s, m_i, l_i, scorer)
        if F.dropout is not None:
            p = tl.where(dropout.keep(F.dropout, bh, start_m, start_n, BLOCK_M, BLOCK_N), p, 0.0)
        v = tile.load(V, stride_v, start_n, lo, hi, BLOCK_N, HEAD_DIM_V, BLOCK_DV, VEC, MASKED)
        v = score.hide_unseen(v, keep, F, 0)
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=RUN_TIME)
def flash_fwd(
    Q, K, V, O, STATS, F, stride_q, stride_k, stride_v, stride_o,
    batch, heads, group, n_q, n_k, tiles, scale, align, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, MOD: tl.constexpr, LINEAR: tl.constexpr, MASK_VEC: tl.constexpr,
    STATS_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads * tiles,), tiles = ceil(n_q / BLOCK_M); packed: (heads * tiles,), tiles as in sequence.py.

    Q (B, heads, n_q, HEAD_DIM), K (B, heads / group, n_k, HEAD_DIM), V (…, HEAD_DIM_V), O (B, heads, n_q, HEAD_DIM_V), STATS
    (B, heads, STATS_ROWS, n_q) fp32 contiguous (softmax.store_stats, rounding.store), F Features; packed sequences have B = 1
    and `batch` of them. align = 1 aligns the last query with the last key, 0 the first with the first. MOD: the user's change
    of scores, a jit function, or None.
    """
    C: tl.constexpr = Static(
        HEAD_DIM_V=HEAD_DIM_V, BLOCK_DV=BLOCK_DV, LINEAR=LINEAR, MASK_VEC=MASK_VEC, STATS_ROWS=STATS_ROWS,
        BLOCK_M=BLOCK_M)  # fmt: skip
    seq, h, start_m = sequence.locate_queries(F, tl.program_id(0), tiles, heads, batch, n_q, n_k, BLOCK_M)
    shift = align * (seq.n_k - seq.n_q)
    Q_h = tile.head(Q, stride_q, seq.at, h, seq.q_row, VEC)
    q = tile.load(Q_h, stride_q, start_m, 0, seq.n_q, BLOCK_M, HEAD_DIM, BLOCK_D, VEC, True)
    q, scale, sign = softmax.fold_scale(q, score.scale_of(F, scale))
    scorer = score.prepare(F, seq, h, scale, shift, C)
    end_m = tl.minimum(start_m + BLOCK_M, seq.n_q)
    lo, full_lo, full_hi, hi = band.key_range(start_m, end_m, scorer.n_k, shift, left, right, F, BLOCK_N)

    bh = seq.b * heads + h
    K = tile.head(K, stride_k, seq.at, h // group, seq.k_row, VEC)
    V = tile.head(V, stride_v, seq.at, h // group, seq.k_row, VEC)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i, l_i = softmax.start(tl.zeros([BLOCK_M], tl.float32), F.sinks, h, seq.real)
    if left is not None:
        acc, m_i, l_i = _attend(
            q, K, V, stride_k, stride_v, acc, m_i, l_i, band.first_tile(lo, F, BLOCK_N), tl.minimum(full_lo, hi), lo, hi,
            start_m, left, right, F, scorer, bh, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            VEC, PRECISION, MOD, LINEAR, MASK_VEC, True)  # fmt: skip
    acc, m_i, l_i = _attend(
        q, K, V, stride_k, stride_v, acc, m_i, l_i, full_lo, full_hi, lo, hi, start_m, left, right, F, scorer, bh,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, VEC, PRECISION, MOD, LINEAR, MASK_VEC, False)  # fmt: skip
    acc, m_i, l_i = _attend(
        q, K, V, stride_k, stride_v, acc, m_i, l_i, full_hi, hi, lo, hi, start_m, left, right, F, scorer, bh,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, VEC, PRECISION, MOD, LINEAR, MASK_VEC, True)  # fmt: skip

    o = acc / softmax.safe(l_i)[:, None]
    if F.dropout is not None:
        o *= F.dropout.factor
    O_h = tile.head(O, stride_o, seq.at, h, seq.q_row, VEC)
    tile.store(O_h, stride_o, start_m, seq.n_q, o, BLOCK_M, HEAD_DIM_V, BLOCK_DV, VEC)
    if STATS_ROWS > 2:
        rounding.store(STATS, O, seq, h, heads, n_q, start_m, o, C)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if not LINEAR:  # the maximum is of whole logits
        sign = 1.0
    softmax.store_stats(softmax.stats_at(STATS, seq, h, heads, n_q, STATS_ROWS), offs_m, n_q, seq.n_q, m_i, l_i, sign)
