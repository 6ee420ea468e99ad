"""Online softmax in base 2: exp2 is one instruction, and scale * log2(e) folds into the multiply-add before it.

That multiply-add rounds c * max and then subtracts it from an exact c * s, which is off by 2^-24 of the maximum: nothing for
products of queries and keys, everything for a row of biases of -1e9. So `exponent` subtracts first where more than a product
stands in the logits (not LINEAR), and running maxima are kept in units of the logits.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022).
"""

import triton
import triton.language as tl

from .score import LOG2E
from .tile import load_row_values

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fold_scale(q, scale):
    """(q', scale') with scale' > 0 and scale' * (q' . k) = scale * (q . k): the row maximum and the -inf of masked scores
    survive a positive factor only, so the sign (or the zero) of scale moves into q."""
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    return (q.to(tl.float32) * sign).to(q.dtype), tl.where(scale == 0, 1.0, tl.abs(scale))


@triton.jit
def exponent(s, reference, S, LINEAR: tl.constexpr):
    """c * (s - reference), for exp2; s [A, B], reference broadcasts to it."""
    if LINEAR:
        return s * S.c - reference * S.c
    else:
        return (s - reference) * S.c


@triton.jit
def start(zero, sinks, h, there):
    """Running maximum and sum of rows that have seen no key yet: nothing, or the head's sink if it is `there`. zero [BLOCK_M]:
    zeros of float32."""
    m_i = zero + float("-inf")
    l_i = zero
    if sinks is not None:
        sink = tl.where(there, tl.load(sinks + h).to(tl.float32), float("-inf"))
        m_i = zero + sink
        l_i += 1.0  # for a sink of -inf too: the first step's alpha, exp2(-inf), takes it away
    return m_i, l_i


@triton.jit
def step(s, m_i, l_i, S, LINEAR: tl.constexpr):
    """Take in a tile of logits s [BLOCK_M, BLOCK_N], -inf where masked; S.c times them is base 2.

    m_i, l_i [BLOCK_M]: running maximum and sum. Returns p, the factor alpha for what was accumulated so far, m_i, l_i.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: keep -inf - -inf from making NaN
    p = tl.math.exp2(exponent(s, m_ref[:, None], S, LINEAR))
    alpha = tl.math.exp2(exponent(m_i, m_ref, S, LINEAR))
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def finish(acc, m_i, l_i, S):
    """Normalise acc [BLOCK_M, BLOCK_DV]; returns it and lse (natural logarithm). A row that saw no key gives 0 and -inf."""
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    return acc / l_safe[:, None], m_i * (S.c * LN2) + tl.math.log2(l_safe) * LN2


@triton.jit
def delta(o, do, F):
    """rowsum(O * dO), which the softmax's derivative subtracts from dP."""
    products = o.to(tl.float32) * do.to(tl.float32)
    if F.sinks is not None:  # a row that saw no key still has an lse: nothing of its gradient but dlse may count
        products = tl.where(o == 0.0, 0.0, products)
    return tl.sum(products, 1)


@triton.jit
def load_lse(LSE, rows, lo, hi, LINEAR: tl.constexpr, MASKED: tl.constexpr):
    """lse of rows, for `weights`: in base 2 where logits are linear. Rows outside [lo, hi) and rows that saw no key get +inf:
    all their p are 0."""
    lse = load_row_values(LSE, rows, lo, hi, float("inf"), MASKED)
    if LINEAR:
        lse *= LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def weights(s, lse, S, LINEAR: tl.constexpr):
    """P of logits s, from what load_lse gave of their rows, [A, 1] or [1, B]."""
    if LINEAR:
        return tl.math.exp2(s * S.c - lse)
    else:
        return tl.math.exp2((s - lse) * LOG2E)
