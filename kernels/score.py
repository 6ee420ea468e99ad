"""From products q . k to logits: scale, softcap, the user's score_mod, ALiBi, bias, and which keys a query sees.

Everything between the dot and the softmax is here, once, for forward and backward. The order is:

s = scale * q . k;  s = softcap * tanh(s / softcap);  s = MOD(s, b, h, i, j);  s -= slope * |i + shift - j|;  s += bias.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import band, tile
from .features import Mask
from .tile import whole

LOG2E = tl.constexpr(1.4426950408889634)


class Scorer(NamedTuple):
    """What the scores of one head of one sequence depend on besides query and key. Absent fields are 0, since Triton 3.6
    returns no None from a function; test F."""

    scale: Any
    c: Any  # logits times c are logits to base 2; where logits are LINEAR, c includes scale
    b: Any
    h: Any
    n_k: Any
    shift: Any
    slope: Any
    mask: Any  # the bool mask or the bias (head_mask)


@triton.jit
def scale_of(F, scale):
    """The scale: the number given, or the one that F.scale points to."""
    if F.scale is not None:
        return tl.load(F.scale)
    else:
        return scale


@triton.jit
def head_mask(M, seq, h, MASK_VEC: tl.constexpr):
    """The part of a mask or a bias that head h of a sequence uses, from its element (0, 0) on."""
    rows = tl.minimum(whole(M.rows), seq.n_q)
    columns = tl.minimum(whole(M.columns), seq.n_k)
    return Mask(tile.head(M.ptr, M.stride, seq.b, h, 0, MASK_VEC), M.stride, rows, columns)


@triton.jit
def prepare(F, seq, h, scale, shift, C: tl.constexpr):
    """The Scorer of head h of a sequence. Its keys end where a mask or a bias ends."""
    slope = 0.0
    c = LOG2E
    if C.LINEAR:
        c = scale * LOG2E
    if F.slopes is not None:
        at = whole(F.slopes.stride_b).to(tl.int64) * seq.b + whole(F.slopes.stride_h) * h
        slope = tl.load(F.slopes.ptr + at, mask=seq.real, other=0.0).to(tl.float32)
    if F.mask is not None:
        mask = head_mask(F.mask, seq, h, C.MASK_VEC)
        return Scorer(scale, c, seq.b, h, mask.columns, shift, slope, mask)
    elif F.bias is not None:
        bias = head_mask(F.bias, seq, h, C.MASK_VEC)
        return Scorer(scale, c, seq.b, h, bias.columns, shift, slope, bias)
    else:
        return Scorer(scale, c, seq.b, h, seq.n_k, shift, slope, 0)


@triton.jit
def tanh(x):
    """tanh to the last bits of float32 everywhere. Near 0, where 1 - 2 / (e^2x + 1) would cancel, it is a polynomial."""
    z = x * x
    poly = ((((-0.006282466 * z + 0.021077753) * z - 0.053853856) * z + 0.13332602) * z - 0.33333318) * z
    far = 1.0 - 2.0 / (tl.math.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * poly, tl.where(x < 0.0, -far, far))


@triton.jit
def distance(offs_m, offs_n, scorer):
    """|i + shift - j|, which ALiBi multiplies by its slope."""
    return tl.abs(offs_m + scorer.shift - offs_n).to(tl.float32)


@triton.jit
def mask_pointers(M, offs_m, offs_n, start_m, start_n, MASK_VEC: tl.constexpr):
    """Pointers to a tile of a head's mask: queries offs_m from start_m on, and keys offs_n from start_n on."""
    row = tile.stride_of(M.stride, 2, MASK_VEC)
    ptr = M.ptr + start_m * row
    if MASK_VEC > 0:  # offsets within a tile fit int32, as in tile.pointers
        return ptr + start_n + ((offs_m - start_m) * row.to(tl.int32) + (offs_n - start_n))
    else:
        return ptr + ((offs_m - start_m) * row + offs_n * tile.stride_of(M.stride, 3, MASK_VEC))


@triton.jit
def _load(M, offs_m, offs_n, start_m, start_n, other, MASK_VEC: tl.constexpr, RAGGED: tl.constexpr):
    """A tile of a mask, `other` outside of it. Without RAGGED the caller knows that the mask has all of the columns."""
    inside = offs_m < M.rows
    if RAGGED:
        inside = inside & (offs_n < M.columns)
    return tl.load(mask_pointers(M, offs_m, offs_n, start_m, start_n, MASK_VEC), mask=inside, other=other)


@triton.jit
def logits(
    s, offs_m, offs_n, start_m, start_n, F, scorer, left, right, C: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """(logits, keep, slope) from the products s = q . k of queries offs_m, from start_m on, and keys offs_n, from start_n on.
    The index tensors broadcast to the shape of s.

    logits * scorer.c are logits to base 2. `keep` is True where the query sees the key; elsewhere logits may be anything, NaN
    too. `slope` is d logits / d (scale * q . k); with a MOD it needs MOD_GRAD. Where keep is True and slope is 1 everywhere,
    they are constants and fold away. MASKED: the tile may cross the band's edges. RAGGED: it may reach beyond the last key.
    """
    keep = (s > 0.0) | True  # True, in the layout of s: Gluon's `full` would need its name
    slope = 1.0
    if MASKED:
        keep = band.visible(offs_m, offs_n, scorer.n_k, scorer.shift, left, right)
    if not C.LINEAR:
        s = s * scorer.scale
    if F.softcap is not None:
        y = tanh(s / F.softcap)
        s = y * F.softcap
        slope = 1.0 - y * y
    if C.MOD is not None:
        if C.MOD_GRAD is not None:
            slope = slope * C.MOD_GRAD(s, scorer.b, scorer.h, offs_m, offs_n)
        s = C.MOD(s, scorer.b, scorer.h, offs_m, offs_n)
    if F.slopes is not None:
        s -= scorer.slope * distance(offs_m, offs_n, scorer)
    if F.bias is not None:
        bias = _load(scorer.mask, offs_m, offs_n, start_m, start_n, float("-inf"), C.MASK_VEC, RAGGED).to(tl.float32)
        s += bias
        keep = keep & (bias != float("-inf"))
    if F.mask is not None:
        keep = keep & (_load(scorer.mask, offs_m, offs_n, start_m, start_n, 0, C.MASK_VEC, RAGGED) != 0)
    return s, keep, slope


@triton.jit
def hide_unseen(x, keep, F, AXIS: tl.constexpr):
    """x [N, D] with zeros in the rows that no query (or key) of the tile sees; AXIS is the other axis of keep. Such rows may
    hold NaN, and a dot would spread 0 * NaN to other rows. Only a mask or a bias hides them: rows beyond the band are never
    loaded."""
    if F.mask is not None or F.bias is not None:
        seen = tl.max(keep.to(tl.int32), AXIS) > 0
        return tl.where(seen[:, None], x, tl.zeros_like(x))
    else:
        return x
