"""Forward and backward of a dense group by PyTorch operations, tile by tile."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import band, compat, dropout, layout
from tfkern.eager_tiles import Scratch, Tile, Tiles, care_for, parts
from tfkern.groups import Group
from tfkern.problem import Gradients, Problem


def forward_group(group: Group) -> tuple[Tensor, Tensor]:
    """out in q's memory order and lse (B, H, Nq) of a group."""
    p, t = group.problem, group.tensors
    out = layout.empty_in_order_of(t.q, p.v_head_dim)
    lse = torch.full(t.q.shape[:3], -math.inf, dtype=p.lse_dtype, device=p.device)
    if not _filled_by_tiles(p):
        out.zero_()
    if t.sinks is not None:
        lse[:] = t.sinks[:, None]  # the lse of rows that see no key; tiles write the others
    care, scratch = care_for(p, t), Scratch(p)
    for part in parts(p, group.numbers):
        tiles = Tiles(p, t, part, care, scratch)
        for tile in tiles:
            _forward_tile(tiles, tile, part.of(out)[:, :, tile.rows], part.of(lse)[:, :, tile.rows])
    return out, lse


def _filled_by_tiles(p: Problem) -> bool:
    """Whether every row of queries is in a tile."""
    return band.alive(p) == slice(0, p.n_q) and min(p.batch, p.heads, p.n_q, p.n_k) > 0


def _forward_tile(tiles: Tiles, tile: Tile, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse of a tile."""
    prob, rows = _softmax(tiles, tiles.logits(tile, tiles.queries(tile)), want_lse=True)
    lse.copy_(rows.lse.squeeze(-1))
    kept, alpha = tiles.kept(tile), 1.0
    if kept is not None:
        prob.mul_(kept)
        alpha = dropout.factor(tiles.p.dropout_p)
    v = _hide_unseen(tiles, tile, tiles.v[:, tile.keys])
    _multiply(tiles.fold(prob), v, out, alpha)  # [rows, keys] @ [keys, Dv]
    if rows.share is not None:
        out.mul_(rows.share)


def _multiply(x: Tensor, y: Tensor, into: Tensor, alpha: float = 1.0, add: bool = False) -> None:
    """Write alpha * x @ y into a tensor (B, H, rows, columns) of any dtype, or add it there. x and y are batches of
    matrices."""
    try:
        place = into.view(len(x), x.shape[1], y.shape[2]) if into.dtype == x.dtype else None
    except RuntimeError:  # its matrices are not evenly apart
        place = None
    if place is not None:
        place.baddbmm_(x, y, beta=float(add), alpha=alpha)
        return
    found = torch.baddbmm(x.new_zeros(()), x, y, beta=0.0, alpha=alpha).view(into.shape)
    into.add_(found) if add else into.copy_(found)


class _Rows(NamedTuple):
    """What is known of the rows of a tile, each (B, H, rows, 1). lse: if wanted. dead: True where a row sees no key; None if no
    row is dead. share and sink: with sinks, the keys' share of all weights, and the sink's."""

    lse: Tensor | None
    dead: Tensor | None
    share: Tensor | None = None
    sink: Tensor | None = None


def _softmax(tiles: Tiles, s: Tensor, want_lse: bool) -> tuple[Tensor, _Rows]:
    """The softmax of s, in place, without sinks, and what is known of its rows. Rows that see no key are 0."""
    want_lse = want_lse or tiles.sinks is not None
    largest, dead = s.amax(-1, keepdim=True) if want_lse or tiles.masked else None, None
    if tiles.masked:
        dead = largest == -math.inf
        if tiles.p.device.type == "cpu" and not dead.any():
            dead = None
    prob = compat.softmax_(s if dead is None else s.masked_fill_(dead, 0.0))
    if dead is not None:
        prob.masked_fill_(dead, 0.0)
    if not want_lse:
        return prob, _Rows(None, dead)
    total = prob.amax(-1, keepdim=True).reciprocal_()  # as the largest weight is 1 / total
    if dead is not None:
        total.masked_fill_(dead, 0.0)
        largest.masked_fill_(dead, 0.0)
    if tiles.sinks is None:
        return prob, _Rows(largest + total.log(), dead)
    sinks = tiles.sinks[:, None].expand_as(largest)
    top = torch.maximum(largest, sinks)
    own, sinks = total * (largest - top).exp_(), (sinks - top).exp_()
    both = own + sinks
    return prob, _Rows(top + both.log(), dead, _of(own, both), _of(sinks, both))


def _of(part: Tensor, whole: Tensor) -> Tensor:
    """The share, 0 of nothing."""
    return part / whole.masked_fill(whole == 0.0, 1.0)


def _hide_unseen(tiles: Tiles, tile: Tile, x: Tensor) -> Tensor:
    """Keys or values with 0 where a mask hides them from all of the tile's queries: a weight of 0 times NaN would be NaN."""
    unseen = tiles.unseen(tile) if tiles.care.needed else None
    return x if unseen is None else x.masked_fill(unseen, 0.0)


def backward_group(group: Group, do: Tensor, dlse: Tensor | None, needed) -> Gradients:
    """The needed gradients of a group; those of bias, slopes and sinks in the wide dtype."""
    p, t = group.problem, group.tensors
    rows = [layout.empty_in_order_of(x, x.shape[-1]) if need else None for x, need in zip(t[:3], needed, strict=False)]
    sums = [torch.zeros_like(x, dtype=p.lse_dtype) if need else None for x, need in zip(t[3:6], needed[3:], strict=True)]
    grads = Gradients(*rows, *sums)
    if grads.q is not None and not _filled_by_tiles(p):
        grads.q.zero_()
    for x in grads[1:3]:  # tiles add to these
        if x is not None:
            x.zero_()
    if grads.sinks is not None and dlse is not None:  # rows that see no key have a weight of 1 for the sink
        seeing = band.alive(p)
        for dead in (slice(0, seeing.start), slice(seeing.stop, None)):
            grads.sinks.add_(dlse[:, :, dead].sum((0, 2)))
    care, scratch = care_for(p, t, do, dlse), Scratch(p)
    for part in parts(p, group.numbers):
        dsinks = None if grads.sinks is None else grads.sinks[part.heads]
        dk, dv = (None if x is None else x[part.batch, part.kv_heads] for x in grads[1:3])
        own = Gradients(part.of(grads.q), dk, dv, part.of(grads.bias), part.of(grads.slopes), dsinks)
        _backward_part(Tiles(p, t, part, care, scratch), part.of(do), part.of(dlse), own)
    return grads


def _backward_part(tiles: Tiles, do: Tensor, dlse: Tensor | None, grads: Gradients) -> None:
    """Add the gradients of a part to `grads`, its views of the group's."""
    sums = [_in_wide(x, name, tiles) for x, name in zip(grads[1:3], ("dk", "dv"), strict=True)]
    own = grads._replace(k=sums[0], v=sums[1])
    for tile in tiles:
        _backward_tile(tiles, tile, do[:, :, tile.rows], None if dlse is None else dlse[:, :, tile.rows], own)
    for x, total in zip(grads[1:3], sums, strict=True):
        if x is not total:
            x.copy_(total)


def _in_wide(x: Tensor | None, name: str, tiles: Tiles) -> Tensor | None:
    """x, a gradient that is still 0, or zeros of its shape in the wide dtype, in which sums lose nothing."""
    if x is None or x.dtype == tiles.p.lse_dtype:
        return x
    return tiles.scratch.take(name, *x.shape).zero_()


def _backward_tile(tiles: Tiles, tile: Tile, do: Tensor, dlse: Tensor | None, grads: Gradients) -> None:
    """Fill the tile's dq and add to the other gradients of its part."""
    q, do = tiles.queries(tile), tiles.fold(do.to(tiles.p.lse_dtype))
    want_scores = any(x is not None for x in (*grads[:2], *grads[3:]))
    prob, rows = _softmax(tiles, tiles.logits(tile, q, want_slope=want_scores), want_lse=dlse is not None)
    if rows.share is not None:
        prob.mul_(rows.share)
    if tiles.care.needed and rows.dead is not None:
        q, do = (x.masked_fill(tiles.fold(rows.dead), 0.0) for x in (q, do))
    kept, factor = tiles.kept(tile), dropout.factor(tiles.p.dropout_p)
    if want_scores:
        ds = _of_scores(tiles, tile, (prob, rows, kept), do, dlse, grads.sinks)
        _from_scores(tiles, tile, q, ds, grads)
    if grads.v is not None:
        if kept is not None:
            prob.mul_(kept)
        _multiply(tiles.fold(prob).mT, do, grads.v[:, :, tile.keys], factor, add=True)  # [keys, rows] @ [rows, Dv]


def _of_scores(tiles: Tiles, tile: Tile, weights, do: Tensor, dlse: Tensor | None, dsinks: Tensor | None) -> Tensor:
    """The gradient of a tile's logits (B, H, rows, keys). Adds the tile's part to the gradient of sinks."""
    prob, rows, kept = weights
    dp = tiles.scores("gradients", tile)
    factor = dropout.factor(tiles.p.dropout_p)
    dp.baddbmm_(do, tiles.v[:, tile.keys].mT, beta=0.0, alpha=factor)  # [rows, Dv] @ [Dv, keys]
    dp = tiles.unfold(dp)
    if kept is not None:
        dp.mul_(kept)
    if tiles.care.needed:
        tile.fill(dp, 0.0)
    if dlse is not None:
        dlse = dlse.to(dp.dtype)[..., None].masked_fill(rows.lse == -math.inf, 0.0)
    if dsinks is not None:
        delta = (prob * dp).sum(-1, keepdim=True)
        dsinks.sub_((rows.sink * (delta if dlse is None else delta - dlse)).sum((0, 2, 3)))
    ds = compat.softmax_backward_(dp, prob)  # with delta = sum(P * dP): sum(O * dO) would have the rounding of O
    if dlse is not None:  # d lse / d s = p
        ds.addcmul_(prob, dlse)
    return tile.fill(ds, 0.0) if tiles.care.needed else ds


def _from_scores(tiles: Tiles, tile: Tile, q: Tensor, ds: Tensor, grads: Gradients) -> None:
    """Pass the gradient of a tile's logits on to the gradients of bias, slopes, q and k."""
    if grads.bias is not None:
        tiles.add_dbias(grads.bias, ds, tile)
    if grads.slopes is not None:
        by_distance = ds.flatten(2) @ tiles.distance(tile).flatten()
        grads.slopes.sub_(by_distance.sum_to_size(grads.slopes.shape))
    if tile.slope is not None:
        ds.mul_(tile.slope)
        ds = tile.fill(ds, 0.0) if tiles.care.needed else ds
    ds = tiles.fold(ds)
    if grads.q is not None:
        k = _hide_unseen(tiles, tile, tiles.k[:, tile.keys])
        k = k if tiles.scale_tensor is None else k * tiles.scale_tensor
        _multiply(ds, k, grads.q[:, :, tile.rows], tiles.scale)  # [rows, keys] @ [keys, D]
    if grads.k is not None:  # a scale that is a tensor is in q already
        _multiply(ds.mT, q, grads.k[:, :, tile.keys], tiles.scale, add=True)  # [keys, rows] @ [rows, D]
