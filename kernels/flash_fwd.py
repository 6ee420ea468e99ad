"""Forward: O = softmax(logits(Q K^T)) V of a tile of queries; keys stream past it (Dao et al., FlashAttention, 2022)."""

import triton
import triton.language as tl

from . import band, dropout, rounding, score, sequence, softmax, tile
from .static import Static
from .work import Work, load_k, load_v, logits

# Changing these numbers never recompiles. Another dtype, head dim or VEC does, and so does an argument that becomes None.
RUN_TIME = [
    "stride_q", "stride_k", "stride_v", "stride_o", "batch", "heads", "group", "n_q", "n_k", "tiles", "align", "left", "right",
]  # fmt: skip


@triton.jit
def _attend(q, acc, m_i, l_i, start, stop, work, F, C: tl.constexpr, MASKED: tl.constexpr):
    """Take the tiles of keys from start to stop into (acc, m_i, l_i)."""
    offs_m = work.start_m + tl.arange(0, C.BLOCK_M)
    for start_n in tl.range(start, stop, C.BLOCK_N):
        offs_n = start_n + tl.arange(0, C.BLOCK_N)
        k = load_k(work, start_n, C, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
        s, keep, _ = logits(s, offs_m, offs_n, start_n, work, F, C, MASKED)
        s = tl.where(keep, s, float("-inf"))
        p, alpha, m_i, l_i = softmax.step(s, m_i, l_i, work.scorer)
        if F.dropout is not None:
            p = tl.where(dropout.keep(F.dropout, work.bh, work.start_m, start_n, C.BLOCK_M, C.BLOCK_N), p, 0.0)
        v = load_v(work, start_n, C, MASKED)
        v = score.hide_unseen(v, keep, F, 0)
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=C.PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=RUN_TIME)
def flash_fwd(
    Q, K, V, O, STATS, F, stride_q, stride_k, stride_v, stride_o,
    batch, heads, group, n_q, n_k, tiles, scale, align, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, MOD: tl.constexpr, LINEAR: tl.constexpr, MASK_VEC: tl.constexpr,
    STATS_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads * tiles,), tiles = ceil(n_q / BLOCK_M). Packed: (heads * tiles,), tiles as in sequence.py.

    Q (B, heads, n_q, HEAD_DIM), K (B, heads / group, n_k, HEAD_DIM), V (B, heads / group, n_k, HEAD_DIM_V), O (B, heads, n_q,
    HEAD_DIM_V), STATS (B, heads, STATS_ROWS, n_q) fp32 contiguous (softmax.store_stats, rounding.store). F: Features. Packed
    sequences have B = 1, and there are `batch` of them. align = 1 aligns the last query with the last key, align = 0 the first
    with the first. MOD: the user's score_mod, a jit function, or None.
    """
    C: tl.constexpr = Static(
        HEAD_DIM=HEAD_DIM, HEAD_DIM_V=HEAD_DIM_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, VEC=VEC, PRECISION=PRECISION, MOD=MOD,
        LINEAR=LINEAR, MASK_VEC=MASK_VEC, STATS_ROWS=STATS_ROWS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    seq, h, start_m = sequence.locate_queries(F, tl.program_id(0), tiles, heads, batch, n_q, n_k, BLOCK_M)
    shift = align * (seq.n_k - seq.n_q)
    Q_h = tile.head(Q, stride_q, seq.at, h, seq.q_row, VEC)
    q = tile.load(Q_h, stride_q, start_m, 0, seq.n_q, BLOCK_M, HEAD_DIM, BLOCK_D, VEC, MASKED=True)
    q, scale, sign = softmax.fold_scale(q, score.scale_of(F, scale))
    scorer = score.prepare(F, seq, h, scale, shift, C)
    end_m = tl.minimum(start_m + BLOCK_M, seq.n_q)
    lo, full_lo, full_hi, hi = band.key_range(start_m, end_m, scorer.n_k, shift, left, right, F, BLOCK_N)

    work = Work(
        K=tile.head(K, stride_k, seq.at, h // group, seq.k_row, VEC), stride_k=stride_k,
        V=tile.head(V, stride_v, seq.at, h // group, seq.k_row, VEC), stride_v=stride_v,
        start_m=start_m, lo=lo, hi=hi, left=left, right=right, scorer=scorer, bh=seq.b * heads + h,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i, l_i = softmax.start(tl.zeros([BLOCK_M], tl.float32), F.sinks, h, seq.real)
    starts, stops = band.parts(band.first_tile(lo, F, BLOCK_N), full_lo, full_hi, hi)
    for PART in tl.static_range(3):  # before, in and behind the full tiles
        if PART > 0 or left is not None:
            acc, m_i, l_i = _attend(q, acc, m_i, l_i, starts[PART], stops[PART], work, F, C, MASKED=PART != 1)

    o = acc / softmax.safe(l_i)[:, None]
    if F.dropout is not None:
        o *= F.dropout.factor
    O_h = tile.head(O, stride_o, seq.at, h, seq.q_row, VEC)
    tile.store(O_h, stride_o, start_m, seq.n_q, o, BLOCK_M, HEAD_DIM_V, BLOCK_DV, VEC)
    if STATS_ROWS > 2:
        rounding.store(STATS, O, seq, h, heads, n_q, start_m, o, C)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if not LINEAR:  # the maximum is in units of logits, not of q . k
        sign = 1.0
    softmax.store_stats(softmax.stats_at(STATS, seq, h, heads, n_q, STATS_ROWS), offs_m, n_q, seq.n_q, m_i, l_i, sign)
