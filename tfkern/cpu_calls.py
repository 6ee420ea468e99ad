"""Which calls of PyTorch's fused CPU attention make up a dense problem. A call has some rows of queries, the keys that these
rows see, and a mask of that tile alone where something is hidden or added.

ALiBi needs only small masks where no other mask has a row for each query. A block of rows attends to the keys near its diagonal
with a mask of that block. All further keys lie on one side of an edge and all rows on the other. There -slope * |i - j| splits
into -slope * |i - edge|, one number a row, which does not change the softmax, and -slope * |edge - j|, one number a key. The
results of the calls are joined by their lse.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import band, compat
from tfkern.problem import Problem, Tensors

# Rows of a call: the cost of a score, relative to a call of all rows (measured with masks, D = 64).
STEPS = {64: 1.45, 128: 1.3, 256: 1.2, 512: 1.1}
ELEMENTS = 1 << 21  # at most, of a mask that is made for a call
KEPT = 1 << 18  # elements at most of a mask that is cached; there are MANY_KEPT of them, 16 MiB in all
MANY_KEPT = 16
BLOCK = 512  # rows of ALiBi that meet the keys near their diagonal; half as many if causal
SLOPES_ELEMENTS = 1 << 22  # of ALiBi's mask for such a block: 16 MiB


class Call(NamedTuple):
    """Slices of query rows and of keys. With `causal` the first row sees the first key, and each further row one key more. With
    `cut` the band needs a mask. With neither, every row sees all of the keys. `edge`, for ALiBi, is the place that all keys lie
    on one side of and all rows on the other."""

    rows: slice
    keys: slice
    causal: bool = False
    cut: bool = False
    edge: int | None = None


class Plan(NamedTuple):
    """`refusal`: why the fused op can't do a problem, else None. `calls`: those of a dense problem; there is none where no row
    sees a key. Each row that sees a key is in one call, or in several whose results are `joined`. `masked`: some call has a
    mask. `whole`: one call has all rows. `exact`: it has all keys as well. `plain`: the result of
    F.scaled_dot_product_attention is out. `boolean`: a bool mask is all that this function needs."""

    refusal: str | None
    calls: list[Call]
    joined: bool
    masked: bool
    whole: bool
    exact: bool
    plain: bool
    boolean: bool


def plan_of(p: Problem) -> Plan:
    """The plan of a problem, which the problem keeps."""
    plan = p.plans.get("cpu")
    if plan is None:
        plan = p.plans["cpu"] = _plan(p)
    return plan


def _plan(p: Problem) -> Plan:
    refusal = _refusal(p)
    calls = [] if refusal or p.packed or p.has_key_lengths else _calls(p)
    masked = bool(p.mask or p.bias or p.has_slopes or any(call.cut for call in calls))
    whole = len(calls) == 1 and calls[0].rows == slice(0, p.n_q)
    exact = whole and calls[0].keys == slice(0, p.n_k)
    plain = whole and p.group == 1 and p.head_dim == p.v_head_dim and not p.has_sinks and not (masked and calls[0].causal)
    boolean = plain and exact and p.mask is not None and not (p.bias or p.has_slopes or calls[0].cut)
    joined = any(call.edge is not None for call in calls)
    return Plan(refusal, calls, joined, masked, whole, exact, plain, boolean)


def _refusal(p: Problem) -> str | None:
    """Why the fused op can't do a problem, None where it can."""
    if compat.flash is None:
        return "this PyTorch has no fused CPU attention that tfkern knows"
    for name in ("softcap", "dropout_p", "score_mod"):
        if getattr(p, name):
            return f"{name} is nothing that PyTorch's fused CPU attention has"
    if p.stats_rows > 2:
        return "precise_delta: PyTorch's fused CPU attention takes delta from a rounded output"
    if p.scale is None or not p.scale >= torch.finfo(torch.float32).tiny:
        return "PyTorch's fused CPU attention wants a scale that is a number above 0 in float32"
    if min(p.head_dim, p.v_head_dim) == 0:
        return "a head dim is 0"
    return None


def _calls(p: Problem) -> list[Call]:
    rows = band.alive(p)
    if rows.start == rows.stop or min(p.batch, p.heads) == 0:
        return []
    whole = _call(p, rows)
    from_the_diagonal = p.right == 0 or not whole.causal
    if p.has_slopes and not whole.cut and from_the_diagonal and all(x is None or x[2] == 1 for x in (p.mask, p.bias)):
        step = max(1, min(BLOCK // 2 if p.right == 0 else BLOCK, math.isqrt(SLOPES_ELEMENTS // p.heads)))
        return [call for i in range(rows.start, rows.stop, step) for call in _slopes_calls(p, i, min(i + step, rows.stop))]
    step = p.n_q
    if whole.cut:
        step = band.step(p, STEPS)
    if whole.cut or _made(p):
        masks = max(1, math.prod(_shape(p)[:2])) * band.seen(p, step)
        step = max(min(STEPS), min(step, int(ELEMENTS // masks)))
    if step >= rows.stop - rows.start:
        return [whole]
    return [_call(p, slice(i, min(i + step, rows.stop))) for i in range(rows.start, rows.stop, step)]


def _shape(p: Problem) -> tuple[int, int]:
    """(B or 1, H or 1) of a call's mask."""
    shapes = [x[:2] for x in (p.mask, p.bias, (1, p.heads) if p.has_slopes else None) if x]
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True)) if shapes else (1, 1)


def _made(p: Problem) -> bool:
    """Whether a mask with a row for each query must be made. (A bias is passed on as it is.)"""
    return p.has_slopes or (p.mask is not None and p.mask[2] > 1)


def _slopes_calls(p: Problem, start: int, stop: int) -> Iterator[Call]:
    """The calls of rows [start, stop) under ALiBi: the keys to the left of their diagonal, those to the right, and the block
    between."""
    first, last = start + band.shift_of(p), stop - 1 + band.shift_of(p)
    lo, hi = min(max(first, 0), p.n_k), min(max(last + 1, 0), p.n_k)
    rows = slice(start, stop)
    if lo > 0:
        yield Call(rows, slice(0, lo), edge=first)
    if hi < p.n_k and p.right != 0:  # any other right side hides nothing here
        yield Call(rows, slice(hi, p.n_k), edge=last)
    if lo < hi:
        yield Call(rows, slice(lo, hi), causal=p.right == 0)


def _call(p: Problem, rows: slice) -> Call:
    shift, keys = band.shift_of(p), band.keys_of(p, rows)
    first, last = rows.start + shift, rows.stop - 1 + shift  # the diagonal of the first row and of the last
    at_left = p.left is not None and last - p.left > keys.start
    at_right = p.right is not None and first + p.right < keys.stop - 1
    causal = at_right and not at_left and first + p.right == keys.start
    return Call(rows, keys, causal, (at_left or at_right) and not causal)


def mask_of(p: Problem, t: Tensors, call: Call, made: dict | None = None) -> Tensor | None:
    """The mask that is added to the scores of a call, (B or 1, H or 1, rows or 1, keys or 1), in a dtype that the op takes.
    `made` keeps masks that other calls of the same problem can use."""
    bias, mask, total = t.bias, t.mask, None
    if call.rows != slice(0, p.n_q) or call.keys != slice(0, p.n_k):
        bias, mask = (None if x is None else band.of_tile(x, call.rows, call.keys) for x in (bias, mask))
    if bias is not None:
        total = bias if bias.dtype in (p.dtype, p.lse_dtype) else bias.to(p.dtype)
    if mask is not None:
        total = _sum(total, _added(mask, p.dtype))
    if call.cut:
        total = _sum(total, _band_mask(p, call))
    if t.slopes is not None:
        total = _sum(total, _slopes_mask(p, t.slopes, call, {} if made is None else made))
    return total


def _slopes_mask(p: Problem, slopes: Tensor, call: Call, made: dict) -> Tensor:
    """What ALiBi adds. Calls of one shape and one position relative to the diagonal share it."""
    rows, keys, first = _shape_of(p, call)
    if call.edge is not None:
        rows, first = 1, call.edge - call.keys.start
    if (key := (rows, keys, first)) not in made:
        made[key] = slopes.to(p.lse_dtype)[:, :, None, None] * _kept(_nearness, *key, p.lse_dtype)
    return made[key]


def _shape_of(p: Problem, call: Call) -> tuple[int, int, int]:
    """(rows, keys, first): the sizes of a call, and the key at which its first row stands."""
    rows, keys = call.rows, call.keys
    return rows.stop - rows.start, keys.stop - keys.start, rows.start + band.shift_of(p) - keys.start


def _kept(make: Callable, rows: int, keys: int, *more) -> Tensor:
    """The result of a cached function; a large one is made anew and not cached."""
    return (make if rows * keys <= KEPT else make.__wrapped__)(rows, keys, *more)


@functools.lru_cache(maxsize=MANY_KEPT)
def _nearness(rows: int, keys: int, first: int, dtype: torch.dtype) -> Tensor:
    """-|i - j|."""
    return _between(rows, keys, first).abs_().neg_().to(dtype)


def _between(rows: int, keys: int, first: int) -> Tensor:
    """i - j, (rows, keys)."""
    return torch.arange(first, first + rows, device="cpu")[:, None] - torch.arange(keys, device="cpu")


def beyond_the_edge(p: Problem, t: Tensors, call: Call) -> Tensor | None:
    """-slope * |i - edge| (B or 1, H, rows), which the logits of a call with an edge leave out; None without an edge."""
    if call.edge is None:
        return None
    i, _ = band.places(p, call.rows, call.keys)
    return t.slopes.to(p.lse_dtype)[:, :, None] * -(i[:, 0] - call.edge).abs().to(p.lse_dtype)


def _sum(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen` is True, else -inf. (1 - 1 / x takes a quarter of the time of masked_fill.)"""
    return seen.to(dtype).reciprocal_().neg_().add_(1.0)


def _band_mask(p: Problem, call: Call) -> Tensor:
    """What the band adds, (1, 1, rows, keys)."""
    return _kept(_band, *_shape_of(p, call), p.left, p.right, p.dtype)


@functools.lru_cache(maxsize=MANY_KEPT)
def _band(rows: int, keys: int, first: int, left: int | None, right: int | None, dtype: torch.dtype) -> Tensor:
    return _added(~band.beyond(_between(rows, keys, first), left, right), dtype)[None, None]
