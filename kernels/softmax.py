"""Online softmax to base 2, since exp2 is one instruction.

A logit less the maximum of its row is exact or nearly so, whatever the size of either, and never above 0. So the difference
comes first, and the scaling second. A single multiply-add of the logit by scale * log2(e) would be off by 2^-24 of the maximum,
which is hundreds for logits of 1e10. The forward stores the maximum of a row and the log of its sum apart: in their sum, lse,
the log would be lost beside a maximum of -1e9. So the backward forms weights as the forward does, and none exceeds 1.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022).
"""

import triton
import triton.language as tl

from .score import LOG2E
from .tile import load_row_values

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fold_scale(q, scale):
    """(q', scale', sign) with scale' > 0 and scale' * (q' . k) = scale * (q . k). The maximum of a row, and the -inf of hidden
    scores, survive multiplication by a positive factor only; so q takes the sign of scale, or its 0."""
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    return (q.to(tl.float32) * sign).to(q.dtype), tl.where(scale == 0, 1.0, tl.abs(scale)), sign


@triton.jit
def start(zero, sinks, h, there):
    """The maximum and the sum of rows before their first key: those of the head's sink if it has one and is `there`, else of
    nothing. zero [BLOCK_M]: zeros of float32."""
    m_i = zero + float("-inf")
    l_i = zero
    if sinks is not None:
        sink = tl.where(there, tl.load(sinks + h).to(tl.float32), float("-inf"))
        m_i = zero + sink
        l_i += 1.0  # also right for a sink of -inf: alpha = 0 of the first step clears it
    return m_i, l_i


@triton.jit
def step(s, m_i, l_i, scorer):
    """Take in a tile of logits s [BLOCK_M, BLOCK_N], which are -inf where hidden; times scorer.c they are to base 2.

    m_i, l_i [BLOCK_M]: running maximum and sum. Returns p, the factor alpha for what was accumulated so far, m_i and l_i.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # before the first key -inf - -inf would be NaN
    p = tl.math.exp2((s - m_ref[:, None]) * scorer.c)
    alpha = tl.math.exp2((m_i - m_ref) * scorer.c)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def safe(l_i):
    """Sums of rows to divide by: 1 for a row that saw no key, whose result is then 0."""
    return tl.where(l_i == 0.0, 1.0, l_i)


@triton.jit
def stats_at(STATS, seq, h, heads, n_q, STATS_ROWS: tl.constexpr):
    """Where the maxima of head h of a sequence lie. The logs of its sums lie n_q further on, and behind them what rounding.py
    stores, if anything."""
    return STATS + (seq.at * heads + h).to(tl.int64) * n_q * STATS_ROWS + seq.q_row


@triton.jit
def store_stats(stats, rows, n_q, hi, m_i, l_i, sign):
    """Store maxima and natural logs of sums, of rows below hi, where `stats_at` points. Maxima are in units of the logits, or
    where those are linear of q . k, with the sign that fold_scale moved into q. A row that saw no key has 0 and -inf."""
    dead = m_i == float("-inf")
    tl.store(stats + rows, tl.where(dead, 0.0, m_i * sign), mask=rows < hi)
    tl.store(stats + n_q + rows, tl.where(dead, float("-inf"), tl.math.log2(l_i) * LN2), mask=rows < hi)


@triton.jit
def delta(o, do, F):
    """rowsum(O * dO), which the derivative of the softmax subtracts from dP."""
    products = o.to(tl.float32) * do.to(tl.float32)
    if F.sinks is not None:  # a row that saw no key has an lse too: of its gradient only dlse counts, and dO may be NaN
        products = tl.where(o == 0.0, 0.0, products)
    return tl.sum(products, 1)


@triton.jit
def load_maximum(stats, rows, lo, hi, MASKED: tl.constexpr):
    """The maxima of rows, 0 outside [lo, hi)."""
    return load_row_values(stats, rows, lo, hi, 0.0, MASKED)


@triton.jit
def load_log2_sum(stats, rows, n_q, lo, hi, MASKED: tl.constexpr):
    """log2(l) of rows. It is +inf, which makes all p 0, outside [lo, hi) and where a row saw no key."""
    log2_l = load_row_values(stats + n_q, rows, lo, hi, float("inf"), MASKED) * LOG2E
    return tl.where(log2_l == float("-inf"), float("inf"), log2_l)


@triton.jit
def exponent(s, m, scorer):
    """The exponent to base 2 of P before it is normalised, from logits s and the maxima m of their rows. It is at most 0 but
    for rounding: where another instruction makes a product than in the forward, its last bits may differ."""
    return (s - m) * scorer.c


@triton.jit
def unnormalised(s, m, scorer):
    """P times the sum l of its row: at most 1."""
    return tl.math.exp2(tl.minimum(exponent(s, m, scorer), 0.0))


@triton.jit
def normalised(x, log2_l):
    """P from exponents x: at most 1 / l."""
    return tl.math.exp2(tl.minimum(x - log2_l, -log2_l))


@triton.jit
def weights(s, m, log2_l, scorer):
    """P from logits s, and m and log2(l) of their rows, [A, 1] or [1, B]."""
    return normalised(exponent(s, m, scorer), log2_l)
