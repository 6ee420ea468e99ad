"""Attention by PyTorch operations, on any device, in O(N) memory.

Where PyTorch's own fused CPU attention covers the problem, that runs. Elsewhere queries go in tiles past all of their keys,
in float32 (float64 for float64): a tile's scores are the largest thing held. Packed sequences go one after the other, for which
their cu_seqlens are read: on a GPU this backend, unlike the kernels, waits for the stream there. A tile has all keys of its
queries, so that the backward makes weights as the forward did, and of the stats needs lse alone, with which m is 0 here.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from tfkern import compat, layout
from tfkern.eager_tiles import Tiles
from tfkern.problem import Gradients, Problem, Tensors, stats_of


def unsupported(problem: Problem) -> list[str]:
    """The reasons why it can't do the problem: none."""
    return []


def _without_autocast(function):
    """Keep autocast, which may be on around us in forward or backward, from narrowing our products."""

    @functools.wraps(function)
    def wrapped(problem, *args, **kwargs):
        kind = problem.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(problem, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(problem, *args, **kwargs)

    return wrapped


@_without_autocast
def forward(problem: Problem, t: Tensors) -> tuple[Tensor, Tensor]:
    """out in q's memory order, stats (B, H, stats_rows, Nq) float32, or float64 for float64; B is 1 for packed sequences."""
    if _covered(problem, t.q, t.k, t.v):
        out, lse = compat.flash(t.q, t.k, t.v, 0.0, _is_causal(problem), scale=problem.scale)
        return layout.like_order(out, t.q), stats_of(lse, problem.stats_rows)
    out = layout.empty_in_order_of(t.q, problem.v_head_dim).zero_()
    lse = torch.full(t.q.shape[:3], -math.inf, dtype=problem.lse_dtype, device=problem.device)
    for p, part, rows, _, first in _sequences(problem, t):
        _forward_tiled(p, part, first, out[:, :, rows], lse[:, :, rows])
    return out, stats_of(lse, problem.stats_rows)


@_without_autocast
def backward(problem: Problem, t: Tensors, out, stats, do, dlse, needed, into=None) -> Gradients:
    """The needed gradients, those of q, k and v in the memory order of what they are the gradients of, or written into the
    three tensors given."""
    into = into or (None, None, None)
    lse = stats.select(2, 1)
    if dlse is None and _covered(problem, t.q, t.k, t.v) and _exact_enough(lse, problem.dtype):
        do = layout.last_dim_dense(do)
        grads = compat.flash_backward(do, t.q, t.k, t.v, out, lse, 0.0, _is_causal(problem), scale=problem.scale)
        return Gradients(*(layout.deliver(g, x, i) for g, x, i in zip(grads, t, into, strict=False)))
    sums = [None if x is None else layout.zeros_in_order_of(x, problem.lse_dtype) for x in t[:3]]
    for x, need in zip(t[3:6], needed[3:], strict=True):
        sums.append(torch.zeros(x.shape, dtype=problem.lse_dtype, device=x.device) if need else None)
    sums = Gradients(*sums)
    for p, part, rows, keys, first in _sequences(problem, t):
        of_rows = tuple(None if x is None else x[:, :, rows] for x in (lse, do, dlse))
        dq, dk, dv = sums.q[:, :, rows], sums.k[:, :, keys], sums.v[:, :, keys]
        dbias = None if sums.bias is None else _of_sequence(sums.bias, problem, p, first)
        dslopes = None if sums.slopes is None else _of_sequence(sums.slopes, problem, p, first)
        _backward_tiled(p, part, first, *of_rows, Gradients(dq, dk, dv, dbias, dslopes, sums.sinks))
    done = [layout.deliver(g, x, i) for g, x, i in zip(sums[:3], t[:3], into, strict=True)]
    return Gradients(*done, *(None if g is None else g.to(x.dtype) for g, x in zip(sums[3:], t[3:6], strict=True)))


def _is_causal(p: Problem) -> bool:
    return p.right == 0


def _covered(p: Problem, *tensors: Tensor) -> bool:
    """Whether PyTorch's fused CPU attention computes exactly this problem."""
    shift = p.n_k - p.n_q if p.lower_right else 0
    full = p.left is None and p.right is None
    # Causal with more keys than queries is not covered: it reads keys that no query sees, and a NaN there would leak. Nor is
    # causal with a scale of 0 or less: it multiplies the -inf of masked scores by that.
    causal = p.plain and p.left is None and p.right == 0 and shift == 0 and p.n_k <= p.n_q and p.scale > 0
    return (
        compat.flash is not None
        and p.device.type == "cpu"
        and p.plain
        and p.stats_rows == 2  # precise_delta: its backward would take delta from a rounded O
        and (full or causal)
        and p.heads == p.kv_heads
        and p.head_dim == p.v_head_dim
        and min(p.batch, p.heads, p.n_q, p.n_k, p.head_dim) > 0
        and all(t.stride(-1) == 1 for t in tensors)  # it takes that for granted and reads past the end otherwise
    )


def _exact_enough(lse: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch's backward, which takes weights from lse, loses less by lse's rounding than results of that dtype do by
    theirs, or no more than a float32 sum of some numbers loses."""
    largest = max(64.0, torch.finfo(dtype).eps * 2**20)
    least, most = lse.aminmax()
    return -largest <= least.item() and most.item() <= largest  # False for NaN


def _sequences(p: Problem, t: Tensors):
    """(problem, tensors, rows, keys, first): the batch as it is, or each packed sequence as a problem of its own, with the
    number of its first sequence."""
    if not p.packed:
        yield p, t, slice(0, p.n_q), slice(0, p.n_k), 0
        return
    cu_q, cu_k = t.cu_q.clamp(0, p.n_q).tolist(), t.cu_k.clamp(0, p.n_k).tolist()
    for b in range(p.batch):
        rows, keys = slice(cu_q[b], max(cu_q[b : b + 2])), slice(cu_k[b], max(cu_k[b : b + 2]))
        part = dataclasses.replace(p, batch=1, n_q=rows.stop - rows.start, n_k=keys.stop - keys.start, packed=False)
        yield (
            part,
            t._replace(
                q=t.q[:, :, rows], k=t.k[:, :, keys], v=t.v[:, :, keys],
                **{name: _of_sequence(getattr(t, name), p, part, b) for name in ("bias", "mask", "slopes")},
            ),
            rows, keys, b,
        )  # fmt: skip


def _of_sequence(x: Tensor | None, whole: Problem, part: Problem, b: int) -> Tensor | None:
    """The part of a mask, a bias or slopes that a packed sequence has."""
    if x is None or not whole.packed:
        return x
    if len(x) > 1:
        x = x[b : b + 1]
    return x if x.dim() == 2 else x[:, :, : part.n_q, : part.n_k]


def _softmax(tiles: Tiles, tile, q: Tensor, want_slope: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For folded queries of a tile: weights (B, H, rows, keys) but for what normalises them, that, weights of the sinks but for
    it, and lse, all of them (B, H, rows, 1)."""
    p, sinks = tiles.p, tiles.t.sinks
    s = tiles.logits(tile, q, want_slope)
    sinks = s.new_full((p.heads,), -math.inf) if sinks is None else sinks.to(s.dtype)
    sinks = sinks[:, None, None].expand(*s.shape[:3], 1)
    largest = torch.maximum(s.amax(-1, keepdim=True), sinks) if s.shape[-1] else sinks
    largest = largest.masked_fill(largest == -math.inf, 0.0)  # no key, no sink: -inf - -inf would be NaN
    weights = s.sub_(largest).exp_()
    sinks = (sinks - largest).exp_()
    total = weights.sum(-1, keepdim=True) + sinks
    return weights, total.masked_fill(total == 0.0, 1.0), sinks, largest + total.log()


def _forward_tiled(p: Problem, t: Tensors, first: int, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse."""
    tiles = Tiles(p, t, first)
    for tile in tiles:
        prob, total, _, tile_lse = _softmax(tiles, tile, tiles.fold(t.q, tile))
        lse[:, :, tile.rows] = tile_lse.squeeze(-1)
        if tile.kept is not None:
            prob = prob * tile.kept
        v = tiles.hide_unseen(tiles.v[:, :, tile.keys], tile)
        product = tiles.unfold(tiles.refold(prob) @ v)  # [rows, keys] @ [keys, Dv]
        out[:, :, tile.rows] = product / total


def _backward_tiled(p: Problem, t: Tensors, first: int, lse, do, dlse, grads: Gradients) -> None:
    """Add to the gradients, which are in the wide dtype."""
    tiles = Tiles(p, t, first)
    scale = p.scale if p.scale is not None else t.scale
    for tile in tiles:
        q, do_t = (tiles.hide_dead(tiles.fold(x, tile), tile) for x in (t.q, do))
        prob, total, sink_prob, _ = _softmax(tiles, tile, q, want_slope=True)
        prob.div_(total)
        kept = prob if tile.kept is None else prob * tile.kept
        grads.v[:, :, tile.keys] += tiles.refold(kept).mT @ do_t  # [keys, rows] @ [rows, Dv]
        dp = tiles.unfold(do_t @ tiles.v[:, :, tile.keys].mT)  # [rows, Dv] @ [Dv, keys]
        if tile.kept is not None:
            dp = dp * tile.kept
        dp = tile.only_seen(dp)
        delta = (prob * dp).sum(-1)  # and not that of O * dO, as O was rounded
        if dlse is not None:  # d lse / d s = p, so its gradient joins delta
            delta = delta - dlse[:, :, tile.rows].to(tiles.compute)
        delta = delta.masked_fill(lse[:, :, tile.rows] == -math.inf, 0.0)
        ds = tile.only_seen(dp.sub_(delta[..., None]).mul_(prob))
        if grads.bias is not None:
            tiles.add_dbias(grads.bias, ds, tile)
        if grads.slopes is not None:
            grads.slopes.sub_((ds * tiles.distance(tile)).sum((2, 3)).sum_to_size(grads.slopes.shape))
        if grads.sinks is not None:
            grads.sinks.sub_((sink_prob.div_(total).squeeze(-1) * delta).sum((0, 2)))
        if tile.slope is not None:
            ds = tile.only_seen(ds * tile.slope)
        ds = tiles.refold(ds)
        k = tiles.hide_unseen(tiles.k[:, :, tile.keys], tile)
        grads.q[:, :, tile.rows] = tiles.unfold(ds @ k) * scale  # [rows, keys] @ [keys, D]
        grads.k[:, :, tile.keys] += (ds.mT @ q) * scale  # [keys, rows] @ [rows, D]
