"""dK and dV; where one tile holds all keys, dQ in the same launch. No atomics: the same inputs give the same bits.

A program owns a tile of keys and sums dK and dV over the queries of its head, or of the whole group of heads that share the
key. It recomputes P from the maximum and the sum that the forward stored of each row. With DQ this kernel is the whole backward
in one launch, and makes each score and each exponential once: as there are no other keys, dS K of a tile of queries is their
dQ. It forms delta as well then.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import band, dropout, score, sequence, softmax, tile
from .static import Static

RUN_TIME = [
    "stride_q", "stride_k", "stride_v", "stride_do", "stride_dq", "stride_dk", "stride_dv",
    "batch", "heads", "group", "n_q", "n_k", "tiles", "align", "left", "right",
]  # fmt: skip


class Work(NamedTuple):
    """A tile of keys from start_n on, and the queries [lo, hi) that see some of them."""

    start_n: Any
    lo: Any
    hi: Any
    n_q: Any  # queries of the sequence
    n_rows: Any  # rows of STATS from a maximum to the log of its sum
    scale: Any
    left: Any  # which queries see a key (band.py)
    right: Any


class Head(NamedTuple):
    """A head of queries: pointers to its first row in each tensor, or None, and what its scores depend on."""

    Q: Any
    DO: Any
    DQ: Any
    stride_q: Any
    stride_do: Any
    stride_dq: Any
    stats: Any
    DLSE: Any
    DELTA: Any
    DSLOPES: Any
    scorer: Any
    bh: Any  # number of the head among the heads of all sequences, for dropout


@triton.jit
def _delta(pt, dpt, head, offs_m, n_q):
    """delta of a tile of queries all of whose keys are in pt and dpt, stored for the gradients of biases and sinks too. It is
    the sum of P * dP itself; rowsum(O * dO) is the same but for the rounding of O."""
    delta = tl.sum(pt * dpt, 0)
    if head.DLSE is not None:
        delta -= tl.load(head.DLSE + offs_m, mask=offs_m < n_q, other=0.0)
    tl.store(head.DELTA + offs_m, delta, mask=offs_m < n_q)
    return delta


@triton.jit
def _store_slopes(pt, dst, head, offs_m, offs_n, n_q):
    """Each query's part of the gradient of ALiBi's slope, of a tile of queries all of whose keys are in pt and dst."""
    hidden = (pt == 0.0) | (offs_n[:, None] >= head.scorer.n_k)
    part = tl.where(hidden, 0.0, dst) * score.distance(offs_m[None, :], offs_n[:, None], head.scorer)
    tl.store(head.DSLOPES + offs_m, -tl.sum(part, 0), mask=offs_m < n_q)


@triton.jit
def _tiles(k, v, dk, dv, start, stop, work, head, F, C: tl.constexpr, MASKED: tl.constexpr):
    """Add the tiles of queries from start to stop to dk and dv. Scores are transposed: P^T and dS^T are left operands."""
    lo, hi, n_q, scorer = work.lo, work.hi, work.n_q, head.scorer
    offs_n = work.start_n + tl.arange(0, C.BLOCK_N)
    # With descriptors the few masked tiles are not pipelined: loads in flight there would cost registers everywhere.
    for start_m in tl.range(start, stop, C.BLOCK_M, num_stages=1 if MASKED and head.stride_q is None else None):
        offs_m = start_m + tl.arange(0, C.BLOCK_M)
        q = tile.load(head.Q, head.stride_q, start_m, lo, hi, C.BLOCK_M, C.HEAD_DIM, C.BLOCK_D, C.VEC, MASKED)
        do = tile.load(head.DO, head.stride_do, start_m, lo, hi, C.BLOCK_M, C.HEAD_DIM_V, C.BLOCK_DV, C.VEC, MASKED)
        if head.DQ is None:
            delta = tile.load_row_values(head.DELTA, offs_m, lo, hi, 0.0, MASKED)
        st = tl.dot(k, tl.trans(q), input_precision=C.PRECISION)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
        st, keep, slope = score.logits(
            st, offs_m[None, :], offs_n[:, None], start_m, work.start_n, F, scorer, work.left, work.right, C, MASKED,
            RAGGED=True)  # fmt: skip
        m = softmax.load_maximum(head.stats, offs_m, lo, hi, MASKED)
        log2_l = softmax.load_log2_sum(head.stats, offs_m, work.n_rows, lo, hi, MASKED)
        pt = tl.where(keep, softmax.weights(st, m[None, :], log2_l[None, :], scorer), 0.0)
        do = score.hide_unseen(do, keep, F, 0)
        if F.dropout is not None:
            kept = dropout.keep_transposed(F.dropout, head.bh, start_m, work.start_n, C.BLOCK_M, C.BLOCK_N)
            # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_DV]
            dv = tl.dot(tl.where(kept, pt, 0.0).to(do.dtype), do, dv, input_precision=C.PRECISION)
        else:
            dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=C.PRECISION)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_DV]
        if head.stride_do is None:  # the product starts from -delta, which then takes no registers of its own
            less = tl.broadcast_to(-delta[None, :], [C.BLOCK_N, C.BLOCK_M])
            # [BLOCK_N, BLOCK_DV] @ [BLOCK_DV, BLOCK_M]
            dst = pt * tl.dot(v, tl.trans(do), less, input_precision=C.PRECISION)
        else:
            dpt = tl.dot(v, tl.trans(do), input_precision=C.PRECISION)  # [BLOCK_N, BLOCK_DV] @ [BLOCK_DV, BLOCK_M]
            if F.dropout is not None:
                dpt = tl.where(kept, dpt * F.dropout.factor, 0.0)
            if MASKED or F.mask is not None or F.bias is not None:
                dpt = tl.where(pt == 0.0, 0.0, dpt)  # what is not seen may be NaN, and 0 * NaN is NaN
            if head.DQ is not None:
                delta = _delta(pt, dpt, head, offs_m, n_q)
            dst = pt * (dpt - delta[None, :])
        if head.DSLOPES is not None:
            _store_slopes(pt, dst, head, offs_m, offs_n, n_q)
        dst = dst * slope
        if MASKED or F.mask is not None or F.bias is not None:
            # slope may be NaN there as well. A test of `keep` here would keep it alive, for 500 instructions more.
            dst = tl.where(pt == 0.0, 0.0, dst)
        q = score.hide_unseen(q, keep, F, 0)
        dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=C.PRECISION)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
        if head.DQ is not None:
            seen = score.hide_unseen(k, keep, F, 1)
            dq = tl.dot(tl.trans(dst.to(k.dtype)), seen, input_precision=C.PRECISION)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
            tile.store(head.DQ, head.stride_dq, start_m, n_q, dq * work.scale, C.BLOCK_M, C.HEAD_DIM, C.BLOCK_D, C.VEC)
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
    """Grid (batch * heads / group * tiles,), tiles = ceil(n_k / BLOCK_N). Packed: (heads / group * tiles,), as in sequence.py.

    DK as K, DV as V, the rest as in flash_bwd_dq. Every row of DK and DV is written: keys that no query sees, and keys that do
    not exist, get 0. Without DQ, the kernel reads the DELTA of flash_bwd_dq; DLSE, DSLOPES and stride_dq are None. With DQ, one
    tile must hold all keys, and sequences are not packed; DQ, DELTA and with slopes DSLOPES are written as by flash_bwd_dq. Q
    and DO may be descriptors (tile.py) where tiles of queries begin with the first that sees a key and end with the tensor:
    without DQ, left, packed sequences, dropout, mask and bias.
    """
    C: tl.constexpr = Static(
        HEAD_DIM=HEAD_DIM, HEAD_DIM_V=HEAD_DIM_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, VEC=VEC, PRECISION=PRECISION, MOD=MOD,
        MOD_GRAD=MOD_GRAD, LINEAR=LINEAR, MASK_VEC=MASK_VEC, STATS_ROWS=STATS_ROWS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
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
    if DQ is not None:  # dQ is written for all queries, those that see no key included
        first, full_lo, full_hi, last = band.all_tiles(full_lo, full_hi, seq.n_q, BLOCK_M)

    K_h = tile.head(K, stride_k, seq.at, h_k, seq.k_row, VEC)
    V_h = tile.head(V, stride_v, seq.at, h_k, seq.k_row, VEC)
    k = tile.load(K_h, stride_k, start_n, seen_lo, seen_hi, BLOCK_N, HEAD_DIM, BLOCK_D, VEC, MASKED=True)
    v = tile.load(V_h, stride_v, start_n, seen_lo, seen_hi, BLOCK_N, HEAD_DIM_V, BLOCK_DV, VEC, MASKED=True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    work = Work(start_n=start_n, lo=lo, hi=hi, n_q=seq.n_q, n_rows=n_q, scale=scale, left=left, right=right)
    starts, stops = band.parts(first, full_lo, full_hi, last)
    for member in range(group):
        h = h_k * group + member
        row = (seq.at * heads + h).to(tl.int64) * n_q + seq.q_row
        DQ_h, DLSE_h, DSLOPES_h = DQ, DLSE, DSLOPES
        if DLSE is not None:
            DLSE_h = DLSE + row
        if DSLOPES is not None:
            DSLOPES_h = DSLOPES + row
        if DQ is not None:
            DQ_h = tile.head(DQ, stride_dq, seq.at, h, seq.q_row, VEC)
        head = Head(
            Q=tile.head(Q, stride_q, seq.at, h, seq.q_row, VEC), stride_q=stride_q,
            DO=tile.head(DO, stride_do, seq.at, h, seq.q_row, VEC), stride_do=stride_do, DQ=DQ_h, stride_dq=stride_dq,
            stats=softmax.stats_at(STATS, seq, h, heads, n_q, STATS_ROWS), DLSE=DLSE_h, DELTA=DELTA + row, DSLOPES=DSLOPES_h,
            scorer=score.prepare(F, seq, h, scale, shift, C), bh=seq.b * heads + h,
        )  # fmt: skip
        for PART in tl.static_range(3):  # before, in and behind the full tiles
            if PART > 0 or right is not None:
                dk, dv = _tiles(k, v, dk, dv, starts[PART], stops[PART], work, head, F, C, MASKED=PART != 1)

    if F.dropout is not None:
        dv *= F.dropout.factor
    keep = (offs_n < there)[:, None]  # rows beyond the length were computed from zeros, not from keys
    DK_h = tile.head(DK, stride_dk, seq.at, h_k, seq.k_row, VEC)
    DV_h = tile.head(DV, stride_dv, seq.at, h_k, seq.k_row, VEC)
    tile.store(DK_h, stride_dk, start_n, rows, tl.where(keep, dk * scale, 0.0), BLOCK_N, HEAD_DIM, BLOCK_D, VEC)
    tile.store(DV_h, stride_dv, start_n, rows, tl.where(keep, dv, 0.0), BLOCK_N, HEAD_DIM_V, BLOCK_DV, VEC)
