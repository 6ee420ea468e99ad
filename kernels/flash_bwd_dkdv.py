"""dK and dV; and where one tile holds all keys, dQ in the same pass. No atomics: the same inputs give the same bits.

flash_bwd_dkdv owns a tile of keys and sums dK and dV over the queries of its head, or of the whole group of heads that share
the key. P is recomputed from the maximum and the sum that each row left. With DQ it is the whole backward in one launch, each
score and each exponential made once: as no other keys are there, dS K of a tile of queries is their dQ, and delta is formed
here as well.
"""

import triton
import triton.language as tl

from . import band, dropout, score, sequence, softmax, tile
from .static import Static

RUN_TIME = [
    "stride_q", "stride_k", "stride_v", "stride_do", "stride_dq", "stride_dk", "stride_dv",
    "batch", "heads", "group", "n_q", "n_k", "tiles", "align", "left", "right",
]  # fmt: skip


@triton.jit
def _delta(pt, dpt, DLSE, DELTA, offs_m, n_q):
    """delta of a tile of queries of which pt and dpt are all there is, left for the gradients of biases and sinks too: the sum
    of P * dP itself, to which rowsum(O * dO) comes by way of a rounded O."""
    delta = tl.sum(pt * dpt, 0)
    if DLSE is not None:
        delta -= tl.load(DLSE + offs_m, mask=offs_m < n_q, other=0.0)
    tl.store(DELTA + offs_m, delta, mask=offs_m < n_q)
    return delta


@triton.jit
def _tiles(
    k, v, Q, DO, STATS, DLSE, DELTA, DQ, DSLOPES, stride_q, stride_do, stride_dq, dk, dv, start, stop, lo, hi, n_q, total_q,
    start_n, scale, left, right, F, scorer, bh,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr, MOD: tl.constexpr, MOD_GRAD: tl.constexpr,
    LINEAR: tl.constexpr, MASK_VEC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the query tiles of [start, stop) to dk and dv. Scores are held transposed, so that P^T and dS^T are left operands."""
    C: tl.constexpr = Static(MOD=MOD, MOD_GRAD=MOD_GRAD, LINEAR=LINEAR, MASK_VEC=MASK_VEC)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    # With descriptors the few tiles that are masked come one by one: what is in flight would take the registers of all.
    for start_m in tl.range(start, stop, BLOCK_M, num_stages=1 if MASKED and stride_q is None else None):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = tile.load(Q, stride_q, start_m, lo, hi, BLOCK_M, HEAD_DIM, BLOCK_D, VEC, MASKED)
        do = tile.load(DO, stride_do, start_m, lo, hi, BLOCK_M, HEAD_DIM_V, BLOCK_DV, VEC, MASKED)
        if DQ is None:
            delta = tile.load_row_values(DELTA, offs_m, lo, hi, 0.0, MASKED)
        st = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
        st, keep, slope = score.logits(
            st, offs_m[None, :], offs_n[:, None], start_m, start_n, F, scorer, left, right, C, MASKED, True)  # fmt: skip
        m = softmax.load_maximum(STATS, offs_m, lo, hi, MASKED)
        log2_l = softmax.load_log2_sum(STATS, offs_m, total_q, lo, hi, MASKED)
        pt = tl.where(keep, softmax.weights(st, m[None, :], log2_l[None, :], scorer), 0.0)
        do = score.hide_unseen(do, keep, F, 0)
        if F.dropout is not None:
            kept = dropout.keep_transposed(F.dropout, bh, start_m, start_n, BLOCK_M, BLOCK_N)
            # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_DV]
            dv = tl.dot(tl.where(kept, pt, 0.0).to(do.dtype), do, dv, input_precision=PRECISION)
        else:
            dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_DV]
        if stride_do is None:  # dP - delta comes out of the product, so that delta takes no registers beside it
            less = tl.broadcast_to(-delta[None, :], [BLOCK_N, BLOCK_M])
            dst = pt * tl.dot(v, tl.trans(do), less, input_precision=PRECISION)  # [BLOCK_N, BLOCK_DV] @ [BLOCK_DV, BLOCK_M]
        else:
            dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_DV] @ [BLOCK_DV, BLOCK_M]
            if F.dropout is not None:
                dpt = tl.where(kept, dpt * F.dropout.factor, 0.0)
            if MASKED or F.mask is not None or F.bias is not None:
                dpt = tl.where(pt == 0.0, 0.0, dpt)  # 0 * NaN in what is not seen
            if DQ is not None:
                delta = _delta(pt, dpt, DLSE, DELTA, offs_m, n_q)
            dst = pt * (dpt - delta[None, :])
        if DSLOPES is not None:
            part = tl.where((pt == 0.0) | (offs_n[:, None] >= scorer.n_k), 0.0, dst) * score.distance(
                offs_m[None, :], offs_n[:, None], scorer
            )
            tl.store(DSLOPES + offs_m, -tl.sum(part, 0), mask=offs_m < n_q)
        dst = dst * slope
        if MASKED or F.mask is not None or F.bias is not None:
            # 0 * NaN in what is not seen; `keep` itself would have to live on, for 500 instructions more
            dst = tl.where(pt == 0.0, 0.0, dst)
        q = score.hide_unseen(q, keep, F, 0)
        dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
        if DQ is not None:
            seen = score.hide_unseen(k, keep, F, 1)
            dq = tl.dot(tl.trans(dst.to(k.dtype)), seen, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
            tile.store(DQ, stride_dq, start_m, n_q, dq * scale, BLOCK_M, HEAD_DIM, BLOCK_D, VEC)
    return dk, dv


@triton.jit(do_not_specialize=RUN_TIME)
def flash_bwd_dkdv(
    Q, DO, K, V, STATS, DLSE, DELTA, DQ, DK, DV, DSLOPES, F,
    stride_q, stride_k, stride_v, stride_do, stride_dq, stride_dk, stride_dv,
    batch, heads, group, n_q, n_k, tiles, scale, align, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, MOD: tl.constexpr, MOD_GRAD: tl.constexpr, LINEAR: tl.constexpr, MASK_VEC: tl.constexpr,
    STATS_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads / group * tiles,), tiles = ceil(n_k / BLOCK_N); packed: (heads / group * tiles,), as in sequence.py.

    DK as K, DV as V. Every key row of the tensors is written: keys that no query sees, and keys that do not exist, get 0.
    Without DQ, DELTA is flash_bwd_dq's, and DLSE, DSLOPES and stride_dq are None. With DQ, one tile must hold all keys
    (not for packed sequences); DQ, DELTA and with slopes DSLOPES are written as flash_bwd_dq writes them. Q and DO may be
    descriptors (tile.py) where no tile of queries begins before those that see a key, or ends before the sequence's last query:
    without DQ, left, packed sequences, dropout, mask and bias.
    """
    C: tl.constexpr = Static(LINEAR=LINEAR, MASK_VEC=MASK_VEC)
    seq, h_k, start_n = sequence.locate_keys(F, tl.program_id(0), tiles, heads // group, batch, n_q, n_k, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = n_k
    if F.cu_k is not None:
        rows = seq.n_k
    shift = align * (seq.n_k - seq.n_q)
    scale = score.scale_of(F, scale)
    there = score.prepare(F, seq, h_k * group, scale, shift, C).n_k
    # Only keys that some query sees are read: what the others hold (padding, NaN) must not matter.
    seen_lo, _, _, seen_hi = band.key_range(0, seq.n_q, there, shift, left, right, F, BLOCK_N)
    end_n = tl.minimum(start_n + BLOCK_N, there)
    n_seen = tl.where(start_n < there, seq.n_q, 0)
    lo, full_lo, full_hi, hi = band.query_range(start_n, end_n, n_seen, shift, left, right, F, BLOCK_M)
    first = band.first_tile(lo, F, BLOCK_M)
    last = hi
    if DQ is not None:  # every query's dQ is written, also of those that see no key
        first, full_lo, full_hi, last = band.all_tiles(full_lo, full_hi, seq.n_q, BLOCK_M)

    K_h = tile.head(K, stride_k, seq.at, h_k, seq.k_row, VEC)
    V_h = tile.head(V, stride_v, seq.at, h_k, seq.k_row, VEC)
    k = tile.load(K_h, stride_k, start_n, seen_lo, seen_hi, BLOCK_N, HEAD_DIM, BLOCK_D, VEC, True)
    v = tile.load(V_h, stride_v, start_n, seen_lo, seen_hi, BLOCK_N, HEAD_DIM_V, BLOCK_DV, VEC, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        h = h_k * group + member
        scorer = score.prepare(F, seq, h, scale, shift, C)
        row = (seq.at * heads + h).to(tl.int64) * n_q + seq.q_row
        stats = softmax.stats_at(STATS, seq, h, heads, n_q, STATS_ROWS)
        Q_h = tile.head(Q, stride_q, seq.at, h, seq.q_row, VEC)
        DO_h = tile.head(DO, stride_do, seq.at, h, seq.q_row, VEC)
        DQ_h, DLSE_h, DSLOPES_h = DQ, DLSE, DSLOPES
        if DQ is not None:
            DQ_h = tile.head(DQ, stride_dq, seq.at, h, seq.q_row, VEC)
        if DLSE is not None:
            DLSE_h = DLSE + row
        if DSLOPES is not None:
            DSLOPES_h = DSLOPES + row
        if right is not None:
            dk, dv = _tiles(
                k, v, Q_h, DO_h, stats, DLSE_h, DELTA + row, DQ_h, DSLOPES_h, stride_q, stride_do, stride_dq,
                dk, dv, first, tl.minimum(full_lo, last), lo, hi, seq.n_q, n_q, start_n, scale, left, right, F, scorer,
                seq.b * heads + h, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, VEC, PRECISION, MOD, MOD_GRAD,
                LINEAR, MASK_VEC,
                True)  # fmt: skip
        dk, dv = _tiles(
            k, v, Q_h, DO_h, stats, DLSE_h, DELTA + row, DQ_h, DSLOPES_h, stride_q, stride_do, stride_dq,
            dk, dv, full_lo, full_hi, lo, hi, seq.n_q, n_q, start_n, scale, left, right, F, scorer, seq.b * heads + h,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, VEC, PRECISION, MOD, MOD_GRAD, LINEAR, MASK_VEC,
            False)  # fmt: skip
        dk, dv = _tiles(
            k, v, Q_h, DO_h, stats, DLSE_h, DELTA + row, DQ_h, DSLOPES_h, stride_q, stride_do, stride_dq,
            dk, dv, full_hi, last, lo, hi, seq.n_q, n_q, start_n, scale, left, right, F, scorer, seq.b * heads + h,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, VEC, PRECISION, MOD, MOD_GRAD, LINEAR, MASK_VEC,
            True)  # fmt: skip

    if F.dropout is not None:
        dv *= F.dropout.factor
    keep = (offs_n < there)[:, None]  # rows beyond the length were computed from zeros, not from keys
    DK_h = tile.head(DK, stride_dk, seq.at, h_k, seq.k_row, VEC)
    DV_h = tile.head(DV, stride_dv, seq.at, h_k, seq.k_row, VEC)
    tile.store(DK_h, stride_dk, start_n, rows, tl.where(keep, dk * scale, 0.0), BLOCK_N, HEAD_DIM, BLOCK_D, VEC)
    tile.store(DV_h, stride_dv, start_n, rows, tl.where(keep, dv, 0.0), BLOCK_N, HEAD_DIM_V, BLOCK_DV, VEC)
