"""Backward in two kernels, no atomics, so the same inputs give the same bits.

flash_bwd_dq owns a tile of queries: it forms delta = rowsum(O * dO) - dLSE, leaves it for the other kernel, and sums dQ over
the keys. flash_bwd_dkdv owns a tile of keys and sums dK and dV over the queries of its head, or of the whole group of heads
that share the key. Both recompute P = exp2(c * S - lse) from the saved lse (Dao et al., FlashAttention, 2022).
"""

import triton
import triton.language as tl

from . import band, softmax, tile

RUN_TIME = [
    "stride_q", "stride_k", "stride_v", "stride_o", "stride_do", "stride_dq", "stride_dk", "stride_dv",
    "heads", "group", "n_q", "n_k", "tiles", "align", "LEFT", "RIGHT",
]  # fmt: skip
DQ_RUN_TIME = [n for n in RUN_TIME if n not in ("stride_dk", "stride_dv")]
DKDV_RUN_TIME = [n for n in RUN_TIME if n not in ("stride_o", "stride_dq")]


@triton.jit
def _dq_tiles(
    q, do, lse, delta, K, V, stride_k, stride_v, dq, start, stop, lo, hi, offs_m, shift, c, LEFT, RIGHT,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the key tiles of [start, stop) to dq."""
    for start_n in tl.range(start, stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = tile.load(K, stride_k, start_n, lo, hi, BLOCK_N, D, BLOCK_D, VEC, MASKED)
        v = tile.load(V, stride_v, start_n, lo, hi, BLOCK_N, DV, BLOCK_DV, VEC, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
        p = tl.math.exp2(s * c - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_N]
        ds = p * (dp - delta[:, None])
        if MASKED:
            ds = tl.where(band.visible(offs_m[:, None], offs_n[None, :], hi, shift, LEFT, RIGHT), ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    return dq


@triton.jit(do_not_specialize=DQ_RUN_TIME)
def flash_bwd_dq(
    Q, K, V, O, DO, LSE, DLSE, DELTA, DQ, KEY_LENGTHS, stride_q, stride_k, stride_v, stride_o, stride_do, stride_dq,
    heads, group, n_q, n_k, tiles, scale, align, LEFT, RIGHT,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads * tiles,), tiles = ceil(n_q / BLOCK_M). Writes DQ and DELTA; DLSE may be None.

    Shapes as in flash_fwd; DO as O, DQ as Q; LSE, DLSE, DELTA (B, heads, n_q) fp32 contiguous.
    """
    index, b, h = tile.locate(tiles, heads)
    start_m = (tiles - 1 - index) * BLOCK_M  # the longest causal rows first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    n_k = tile.length(KEY_LENGTHS, b, n_k)
    shift = align * (n_k - n_q)
    c = scale * softmax.LOG2E
    lo, full_lo, full_hi, hi = band.key_range(start_m, tl.minimum(start_m + BLOCK_M, n_q), n_k, shift, LEFT, RIGHT, BLOCK_N)

    row = (b * heads + h).to(tl.int64) * n_q
    in_rows = offs_m < n_q
    q = tile.load(tile.head(Q, stride_q, b, h, VEC), stride_q, start_m, 0, n_q, BLOCK_M, D, BLOCK_D, VEC, True)
    o = tile.load(tile.head(O, stride_o, b, h, VEC), stride_o, start_m, 0, n_q, BLOCK_M, DV, BLOCK_DV, VEC, True)
    do = tile.load(tile.head(DO, stride_do, b, h, VEC), stride_do, start_m, 0, n_q, BLOCK_M, DV, BLOCK_DV, VEC, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + row + offs_m, mask=in_rows, other=0.0)  # d lse / d s = p, so its gradient joins delta
    tl.store(DELTA + row + offs_m, delta, mask=in_rows)
    lse = softmax.load_lse(LSE + row, offs_m, 0, n_q, True)

    K = tile.head(K, stride_k, b, h // group, VEC)
    V = tile.head(V, stride_v, b, h // group, VEC)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEFT is not None:
        dq = _dq_tiles(
            q, do, lse, delta, K, V, stride_k, stride_v, dq, lo, tl.minimum(full_lo, hi), lo, hi, offs_m, shift, c,
            LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, VEC, PRECISION, True)  # fmt: skip
    dq = _dq_tiles(
        q, do, lse, delta, K, V, stride_k, stride_v, dq, full_lo, full_hi, lo, hi, offs_m, shift, c,
        LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, VEC, PRECISION, False)  # fmt: skip
    dq = _dq_tiles(
        q, do, lse, delta, K, V, stride_k, stride_v, dq, full_hi, hi, lo, hi, offs_m, shift, c,
        LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, VEC, PRECISION, True)  # fmt: skip
    tile.store(tile.head(DQ, stride_dq, b, h, VEC), stride_dq, start_m, n_q, dq * scale, BLOCK_M, D, BLOCK_D, VEC)


@triton.jit
def _dkdv_tiles(
    k, v, Q, DO, LSE, DELTA, stride_q, stride_do, dk, dv, start, stop, lo, hi, offs_n, n_k, shift, c, LEFT, RIGHT,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the query tiles of [start, stop) to dk and dv. Scores are held transposed, so that P^T and dS^T are left operands."""
    for start_m in tl.range(start, stop, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = tile.load(Q, stride_q, start_m, lo, hi, BLOCK_M, D, BLOCK_D, VEC, MASKED)
        do = tile.load(DO, stride_do, start_m, lo, hi, BLOCK_M, DV, BLOCK_DV, VEC, MASKED)
        lse = softmax.load_lse(LSE, offs_m, lo, hi, MASKED)
        if MASKED:
            delta = tl.load(DELTA + offs_m, mask=(offs_m >= lo) & (offs_m < hi), other=0.0)
        else:
            delta = tl.load(DELTA + offs_m)
        st = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
        pt = tl.math.exp2(st * c - lse[None, :])
        if MASKED:
            pt = tl.where(band.visible(offs_m[None, :], offs_n[:, None], n_k, shift, LEFT, RIGHT), pt, 0.0)
        dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_DV]
        dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_DV] @ [BLOCK_DV, BLOCK_M]
        dst = pt * (dpt - delta[None, :])
        dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    return dk, dv


@triton.jit(do_not_specialize=DKDV_RUN_TIME)
def flash_bwd_dkdv(
    Q, K, V, DO, LSE, DELTA, DK, DV_OUT, KEY_LENGTHS, stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv,
    heads, group, n_q, n_k, tiles, scale, align, LEFT, RIGHT,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads / group * tiles,), tiles = ceil(n_k / BLOCK_N). DELTA is flash_bwd_dq's. DK as K, DV_OUT as V.

    Every key row of the tensors is written: keys that no query sees, and keys beyond KEY_LENGTHS, get 0.
    """
    index, b, h_k = tile.locate(tiles, heads // group)
    start_n = index * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = n_k
    n_k = tile.length(KEY_LENGTHS, b, n_k)
    shift = align * (n_k - n_q)
    c = scale * softmax.LOG2E
    end_n = tl.minimum(start_n + BLOCK_N, n_k)
    lo, full_lo, full_hi, hi = band.query_range(
        start_n, end_n, tl.where(start_n < n_k, n_q, 0), shift, LEFT, RIGHT, BLOCK_M)  # fmt: skip

    # Only keys that some query sees are read: what the others hold (padding, NaN) must not matter.
    seen_lo, _, _, seen_hi = band.key_range(0, n_q, n_k, shift, LEFT, RIGHT, BLOCK_N)
    k = tile.load(tile.head(K, stride_k, b, h_k, VEC), stride_k, start_n, seen_lo, seen_hi, BLOCK_N, D, BLOCK_D, VEC, True)
    v = tile.load(tile.head(V, stride_v, b, h_k, VEC), stride_v, start_n, seen_lo, seen_hi, BLOCK_N, DV, BLOCK_DV, VEC, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        h = h_k * group + member
        row = (b * heads + h).to(tl.int64) * n_q
        Q_h = tile.head(Q, stride_q, b, h, VEC)
        DO_h = tile.head(DO, stride_do, b, h, VEC)
        if RIGHT is not None:
            dk, dv = _dkdv_tiles(
                k, v, Q_h, DO_h, LSE + row, DELTA + row, stride_q, stride_do, dk, dv, lo, tl.minimum(full_lo, hi), lo, hi,
                offs_n, n_k, shift, c, LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, VEC, PRECISION, True)  # fmt: skip
        dk, dv = _dkdv_tiles(
            k, v, Q_h, DO_h, LSE + row, DELTA + row, stride_q, stride_do, dk, dv, full_lo, full_hi, lo, hi,
            offs_n, n_k, shift, c, LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, VEC, PRECISION, False)  # fmt: skip
        dk, dv = _dkdv_tiles(
            k, v, Q_h, DO_h, LSE + row, DELTA + row, stride_q, stride_do, dk, dv, full_hi, hi, lo, hi,
            offs_n, n_k, shift, c, LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, VEC, PRECISION, True)  # fmt: skip

    keep = (offs_n < n_k)[:, None]  # rows beyond the length were computed from zeros, not from keys
    dk = tl.where(keep, dk * scale, 0.0)
    tile.store(tile.head(DK, stride_dk, b, h_k, VEC), stride_dk, start_n, rows, dk, BLOCK_N, D, BLOCK_D, VEC)
    tile.store(
        tile.head(DV_OUT, stride_dv, b, h_k, VEC), stride_dv, start_n, rows, tl.where(keep, dv, 0.0), BLOCK_N, DV, BLOCK_DV, VEC
    )
