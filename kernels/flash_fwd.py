"""Forward: O = softmax(scale * Q K^T) V for one tile of queries, keys streamed past it (Dao et al., FlashAttention, 2022)."""

import triton
import triton.language as tl

from . import band, softmax, tile

# Changing these numbers never recompiles; what does recompile is dtype, head dim, VEC and which arguments are None.
RUN_TIME = ["stride_q", "stride_k", "stride_v", "stride_o", "heads", "group", "n_q", "n_k", "tiles", "align", "LEFT", "RIGHT"]


@triton.jit
def _attend(
    q, K, V, stride_k, stride_v, acc, m_i, l_i, start, stop, lo, hi, offs_m, shift, c, LEFT, RIGHT,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the key tiles of [start, stop) into (acc, m_i, l_i)."""
    for start_n in tl.range(start, stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = tile.load(K, stride_k, start_n, lo, hi, BLOCK_N, D, BLOCK_D, VEC, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
        if MASKED:
            s = tl.where(band.visible(offs_m[:, None], offs_n[None, :], hi, shift, LEFT, RIGHT), s, float("-inf"))
        p, alpha, m_i, l_i = softmax.step(s, m_i, l_i, c)
        v = tile.load(V, stride_v, start_n, lo, hi, BLOCK_N, DV, BLOCK_DV, VEC, MASKED)
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=RUN_TIME)
def flash_fwd(
    Q, K, V, O, LSE, KEY_LENGTHS, stride_q, stride_k, stride_v, stride_o,
    heads, group, n_q, n_k, tiles, scale, align, LEFT, RIGHT,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads * tiles,), tiles = ceil(n_q / BLOCK_M).

    Q (B, heads, n_q, D), K (B, heads / group, n_k, D), V (…, DV), O (B, heads, n_q, DV), LSE (B, heads, n_q) fp32 contiguous,
    KEY_LENGTHS (B,) integers or None. align = 1 aligns the last query with the last key, 0 the first with the first.
    """
    index, b, h = tile.locate(tiles, heads)
    start_m = (tiles - 1 - index) * BLOCK_M  # under a causal mask the last tiles are the longest: start them first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    n_k = tile.length(KEY_LENGTHS, b, n_k)
    shift = align * (n_k - n_q)
    lo, full_lo, full_hi, hi = band.key_range(start_m, tl.minimum(start_m + BLOCK_M, n_q), n_k, shift, LEFT, RIGHT, BLOCK_N)

    q = tile.load(tile.head(Q, stride_q, b, h, VEC), stride_q, start_m, 0, n_q, BLOCK_M, D, BLOCK_D, VEC, True)
    q, c = softmax.fold_scale(q, scale)
    K = tile.head(K, stride_k, b, h // group, VEC)
    V = tile.head(V, stride_v, b, h // group, VEC)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if LEFT is not None:
        acc, m_i, l_i = _attend(
            q, K, V, stride_k, stride_v, acc, m_i, l_i, lo, tl.minimum(full_lo, hi), lo, hi, offs_m, shift, c, LEFT, RIGHT,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, VEC, PRECISION, True)  # fmt: skip
    acc, m_i, l_i = _attend(
        q, K, V, stride_k, stride_v, acc, m_i, l_i, full_lo, full_hi, lo, hi, offs_m, shift, c, LEFT, RIGHT,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, VEC, PRECISION, False)  # fmt: skip
    acc, m_i, l_i = _attend(
        q, K, V, stride_k, stride_v, acc, m_i, l_i, full_hi, hi, lo, hi, offs_m, shift, c, LEFT, RIGHT,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, VEC, PRECISION, True)  # fmt: skip

    o, lse = softmax.finish(acc, m_i, l_i)
    tile.store(tile.head(O, stride_o, b, h, VEC), stride_o, start_m, n_q, o, BLOCK_M, DV, BLOCK_DV, VEC)
    tl.store(LSE + (b * heads + h).to(tl.int64) * n_q + offs_m, lse, mask=offs_m < n_q)
