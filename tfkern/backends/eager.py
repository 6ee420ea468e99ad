"""Attention by PyTorch operations, on any device, in O(N) memory.

Where PyTorch's own fused CPU attention covers the problem, that runs. Elsewhere queries go in tiles past all of their keys,
in float32 (float64 for float64): a tile's scores are the largest thing held.
"""

import functools
import math

import torch
from torch import Tensor

from tfkern import layout
from tfkern.problem import Problem

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

TILE_ELEMENTS = 1 << 22  # scores held at once: 16 MiB of float32, unless one row of queries alone has more


def unsupported(problem: Problem) -> list[str]:
    """The reasons why it can't do the problem: none."""
    return []


def _without_autocast(function):
    """Keep autocast, which may be on around us in forward or backward, from narrowing our products."""

    @functools.wraps(function)
    def wrapped(problem, *args):
        kind = problem.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(problem, *args)
        with torch.autocast(kind, enabled=False):
            return function(problem, *args)

    return wrapped


@_without_autocast
def forward(problem: Problem, q, k, v, key_lengths):
    """out in q's memory order, lse (B, H, Nq) float32, or float64 for float64."""
    if _is_empty(problem):
        out = layout.empty_in_order_of(q, problem.v_head_dim).zero_()
        return out, torch.full(q.shape[:3], -math.inf, dtype=problem.lse_dtype, device=problem.device)
    if _covered(problem, q, k, v):
        out, lse = _flash(q, k, v, 0.0, _is_causal(problem), scale=problem.scale)
        return layout.like_order(out, q), lse.contiguous()
    return _forward_tiled(problem, q, k, v, key_lengths)


@_without_autocast
def backward(problem: Problem, needed, do, dlse, q, k, v, key_lengths, out, lse):
    """dq, dk, dv, each in the memory order of what it is the gradient of."""
    if _is_empty(problem):
        return tuple(layout.zeros_in_order_of(x, x.dtype) for x in (q, k, v))
    if dlse is None and _covered(problem, q, k, v):
        do = layout.last_dim_dense(do)
        grads = _flash_backward(do, q, k, v, out, lse, 0.0, _is_causal(problem), scale=problem.scale)
        return tuple(layout.like_order(g, x) for g, x in zip(grads, (q, k, v), strict=True))
    return _backward_tiled(problem, do, dlse, q, k, v, key_lengths, out, lse)


def _is_empty(p: Problem) -> bool:
    """Whether no query meets any key."""
    return min(p.batch, p.heads, p.n_q, p.n_k) == 0


def _is_causal(p: Problem) -> bool:
    return p.right == 0


def _covered(p: Problem, *tensors: Tensor) -> bool:
    """Whether PyTorch's fused CPU attention computes exactly this problem."""
    shift = p.n_k - p.n_q if p.lower_right else 0
    full = p.left is None and p.right is None
    # Causal with more keys than queries is not covered: it reads keys that no query sees, and a NaN there would leak. Nor is
    # causal with a scale of 0 or less: it multiplies the -inf of masked scores by that.
    causal = p.left is None and p.right == 0 and shift == 0 and p.n_k <= p.n_q and p.scale > 0
    return (
        p.device.type == "cpu"
        and (full or causal)
        and not p.has_key_lengths
        and p.heads == p.kv_heads
        and p.head_dim == p.v_head_dim
        and p.head_dim > 0
        and all(t.stride(-1) == 1 for t in tensors)  # it takes that for granted and reads past the end otherwise
    )


class _Tiles:
    """The tiled form's view of a problem: heads of a group folded into rows, so that (B, Hkv, group * rows, ·) meets
    (B, Hkv, keys, ·) in one batched product and gradients of shared keys add up by themselves."""

    def __init__(self, p: Problem, key_lengths):
        self.p = p
        self.lengths = None if key_lengths is None else key_lengths.clamp(0, p.n_k).view(-1, 1, 1)
        self.rows = max(1, min(p.n_q, TILE_ELEMENTS // max(1, p.batch * p.heads * p.n_k)))
        self.compute = p.lse_dtype
        self.masked = p.left is not None or p.right is not None or p.has_key_lengths

    def keys(self, x: Tensor) -> Tensor:
        """Keys or values for computing: in the wide dtype, with 0 where no query sees them, whatever stood there."""
        x = x.to(self.compute)
        if not self.masked:
            return x
        p = self.p
        count = p.n_k if self.lengths is None else self.lengths[..., 0]
        shift = count - p.n_q if p.lower_right else 0
        j = torch.arange(p.n_k, device=x.device)
        unseen = j >= count
        if p.left is not None:
            unseen = unseen | (j < shift - p.left)
        if p.right is not None:
            unseen = unseen | (j >= p.n_q + shift + p.right)
        return x.masked_fill(unseen.view(-1, 1, p.n_k, 1), 0.0)

    def fold(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of (B, H, Nq, …) as (B, Hkv, group * rows, …) in the wide dtype."""
        tile = x[:, :, start:stop].to(self.compute)
        return tile.reshape(self.p.batch, self.p.kv_heads, self.p.group * (stop - start), *x.shape[3:])

    def unfold(self, x: Tensor) -> Tensor:
        return x.reshape(self.p.batch, self.p.heads, -1, *x.shape[3:])

    def __iter__(self):
        """(start, stop, lo, hi, hidden): query rows, the keys they need at most, and which of those scores are masked."""
        p = self.p
        for start in range(0, p.n_q, self.rows):
            stop = min(start + self.rows, p.n_q)
            lo, hi = self._key_range(start, stop)
            yield start, stop, lo, hi, self._hidden(start, stop, lo, hi)

    def _key_range(self, start: int, stop: int) -> tuple[int, int]:
        p = self.p
        if p.lower_right and p.has_key_lengths:
            return 0, p.n_k  # each batch is shifted by its own length, which only the device knows
        shift = p.n_k - p.n_q if p.lower_right else 0
        lo = 0 if p.left is None else min(max(start + shift - p.left, 0), p.n_k)
        hi = p.n_k if p.right is None else min(max(stop + shift + p.right, lo), p.n_k)
        return lo, hi

    def _hidden(self, start: int, stop: int, lo: int, hi: int) -> Tensor | None:
        """(B or 1, 1, group * rows, hi - lo) bool, True where masked; None if nothing is."""
        if not self.masked:
            return None
        p = self.p
        i = torch.arange(start, stop, device=p.device)[:, None]
        j = torch.arange(lo, hi, device=p.device)[None, :]
        count = p.n_k if self.lengths is None else self.lengths
        i = i + (count - p.n_q if p.lower_right else 0)
        hidden = j >= count
        if p.left is not None:
            hidden = hidden | (j < i - p.left)
        if p.right is not None:
            hidden = hidden | (j > i + p.right)
        batch = 1 if self.lengths is None else p.batch
        return hidden.expand(batch, stop - start, hi - lo).repeat(1, p.group, 1)[:, None]


def _scores(p: Problem, q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    s = (q @ k.mT) * p.scale  # [rows, D] @ [D, keys]
    return s if hidden is None else s.masked_fill_(hidden, -math.inf)


def _forward_tiled(p: Problem, q, k, v, key_lengths):
    out = layout.empty_in_order_of(q, p.v_head_dim)
    lse = torch.empty(p.batch, p.heads, p.n_q, dtype=p.lse_dtype, device=p.device)
    tiles = _Tiles(p, key_lengths)
    k, v = tiles.keys(k), tiles.keys(v)
    for start, stop, lo, hi, hidden in tiles:
        s = _scores(p, tiles.fold(q, start, stop), k[:, :, lo:hi], hidden)
        row_lse = torch.logsumexp(s, -1)
        prob = s.sub_(_finite(row_lse)[..., None]).exp_()
        out[:, :, start:stop] = tiles.unfold(prob @ v[:, :, lo:hi])  # [rows, keys] @ [keys, Dv]
        lse[:, :, start:stop] = tiles.unfold(row_lse)
    return out, lse


def _backward_tiled(p: Problem, do, dlse, q, k, v, key_lengths, out, lse):
    dq = layout.empty_in_order_of(q, p.head_dim)
    tiles = _Tiles(p, key_lengths)
    dk, dv = (layout.zeros_in_order_of(x, tiles.compute) for x in (k, v))
    k, v = tiles.keys(k), tiles.keys(v)
    for start, stop, lo, hi, hidden in tiles:
        keys = slice(lo, hi)
        row_lse = tiles.fold(lse, start, stop)
        dead = (row_lse == -math.inf)[..., None]  # rows that see no key: whatever they hold, nothing comes of it
        q_t, do_t, out_t = (tiles.fold(x, start, stop).masked_fill(dead, 0.0) for x in (q, do, out))
        prob = _scores(p, q_t, k[:, :, keys], hidden).sub_(_finite(row_lse)[..., None]).exp_()
        delta = (out_t * do_t).sum(-1)
        if dlse is not None:
            # d lse / d s = p, so its gradient joins delta
            delta = delta - tiles.fold(dlse, start, stop).masked_fill(dead[..., 0], 0.0)
        dv[:, :, keys] += prob.mT @ do_t  # [keys, rows] @ [rows, Dv]
        ds = (do_t @ v[:, :, keys].mT).sub_(delta[..., None]).mul_(prob)  # [rows, Dv] @ [Dv, keys]
        dq[:, :, start:stop] = tiles.unfold(ds @ k[:, :, keys]) * p.scale  # [rows, keys] @ [keys, D]
        dk[:, :, keys] += (ds.mT @ q_t) * p.scale  # [keys, rows] @ [rows, D]
    return dq, dk.to(p.dtype), dv.to(p.dtype)


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for the -inf of rows that see no key, so that their exp(-inf - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)
