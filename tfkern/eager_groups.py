"""Forward and backward of a dense group by PyTorch operations, tile by tile."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import band, compat, dropout, layout
from tfkern.eager_tiles import Tile, Tiles, parts
from tfkern.groups import Group
from tfkern.problem import Gradients


def forward_group(group: Group) -> tuple[Tensor, Tensor]:
    """out in q's memory order and lse (B, H, Nq) of a group."""
    p, t = group.problem, group.tensors
    out = layout.empty_in_order_of(t.q, p.v_head_dim).zero_()
    lse = torch.full(t.q.shape[:3], -math.inf, dtype=p.lse_dtype, device=p.device)
    if t.sinks is not None:
        lse[:] = t.sinks[:, None]  # of rows that see no key; the others follow
    for part in parts(p, group.numbers):
        tiles = Tiles(p, t, part)
        for tile in tiles:
            _forward_tile(tiles, tile, part.of(out)[:, :, tile.rows], part.of(lse)[:, :, tile.rows])
    return out, lse


def _forward_tile(tiles: Tiles, tile: Tile, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse of a tile."""
    prob, rows = _softmax(tiles, tile, tiles.logits(tile, tiles.queries(tile)))
    lse.copy_(rows.lse.squeeze(-1))
    kept = tiles.kept(tile)
    if kept is not None:
        prob.mul_(kept)
    v = _hide_unseen(tiles, tile, tiles.v[:, :, tile.keys])
    product = tiles.unfold(tiles.fold(prob) @ v)  # [rows, keys] @ [keys, Dv]
    if kept is not None:
        product.mul_(dropout.factor(tiles.p.dropout_p))
    out.copy_(product if rows.share is None else product.mul_(rows.share))


class _Rows(NamedTuple):
    """Of rows of logits, each (B, H, rows, 1): their lse; where they see no key, None for nowhere; and where there are sinks,
    the share of all weights that the keys have, and that of the sink."""

    lse: Tensor
    dead: Tensor | None
    share: Tensor | None = None
    sink: Tensor | None = None


def _softmax(tiles: Tiles, tile: Tile, s: Tensor) -> tuple[Tensor, _Rows]:
    """Weights of logits, which they overwrite, as if there were no sinks; 0 in rows that see no key."""
    largest = s.amax(-1, keepdim=True)
    dead = largest == -math.inf if tile.hidden else None
    if dead is not None and tiles.p.device.type == "cpu" and not dead.any():
        dead = None
    prob = torch.softmax(s if dead is None else s.masked_fill_(dead, 0.0), -1)
    total = prob.amax(-1, keepdim=True).reciprocal_()  # as the largest weight is 1 / total
    if dead is not None:
        prob.masked_fill_(dead, 0.0)
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
    unseen = tiles.unseen(tile) if tiles.careful else None
    return x if unseen is None else x.masked_fill(unseen, 0.0)


def backward_group(group: Group, do: Tensor, dlse: Tensor | None, needed) -> Gradients:
    """The needed gradients of a group; those of bias, slopes and sinks in the wide dtype."""
    p, t = group.problem, group.tensors
    rows = [layout.zeros_in_order_of(x, x.dtype) if need else None for x, need in zip(t[:3], needed, strict=False)]
    sums = [torch.zeros_like(x, dtype=p.lse_dtype) if need else None for x, need in zip(t[3:6], needed[3:], strict=True)]
    grads = Gradients(*rows, *sums)
    if grads.sinks is not None and dlse is not None:  # rows that see no key have a weight of 1 for the sink
        seeing = band.alive(p)
        for dead in (slice(0, seeing.start), slice(seeing.stop, None)):
            grads.sinks.add_(dlse[:, :, dead].sum((0, 2)))
    for part in parts(p, group.numbers):
        tiles = Tiles(p, t, part)
        do_part, dlse_part = part.of(do), part.of(dlse)
        tiles.rely_on(do_part, dlse_part)
        dk, dv = (None if g is None else torch.zeros_like(x) for g, x in zip(grads[1:3], (tiles.k, tiles.v), strict=True))
        dsinks = None if grads.sinks is None else grads.sinks[part.heads]
        own = Gradients(part.of(grads.q), dk, dv, part.of(grads.bias), part.of(grads.slopes), dsinks)
        for tile in tiles:
            _backward_tile(tiles, tile, do_part[:, :, tile.rows], _rows(dlse_part, tile.rows), own)
        for whole, part_of_it in ((grads.k, dk), (grads.v, dv)):
            if part_of_it is not None:
                whole[part.batch, part.kv_heads] = part_of_it.to(whole.dtype)
    return grads


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[:, :, rows]


def _backward_tile(tiles: Tiles, tile: Tile, do: Tensor, dlse: Tensor | None, grads: Gradients) -> None:
    """Fill the tile's dq and add to the other gradients of its part."""
    q, do = tiles.queries(tile), tiles.fold(do.to(tiles.compute))
    prob, rows = _softmax(tiles, tile, tiles.logits(tile, q, want_slope=True))
    if rows.share is not None:
        prob.mul_(rows.share)
    if tiles.careful and rows.dead is not None:
        q, do = (x.masked_fill(tiles.fold(rows.dead), 0.0) for x in (q, do))
    kept = tiles.kept(tile)
    if kept is not None:
        do = do * dropout.factor(tiles.p.dropout_p)
    if grads.v is not None:
        weights = prob if kept is None else prob * kept
        grads.v[:, :, tile.keys] += tiles.fold(weights).mT @ do  # [keys, rows] @ [rows, Dv]
    if all(x is None for x in (*grads[:2], *grads[3:])):
        return
    dp = tiles.unfold(do @ tiles.v[:, :, tile.keys].mT)  # [rows, Dv] @ [Dv, keys]
    if kept is not None:
        dp.mul_(kept)
    if tiles.careful:
        tile.fill(dp, 0.0)
    if dlse is not None:
        dlse = dlse.to(tiles.compute)[..., None].masked_fill(rows.lse == -math.inf, 0.0)
    if grads.sinks is not None:
        delta = (prob * dp).sum(-1, keepdim=True)
        grads.sinks.sub_((rows.sink * (delta if dlse is None else delta - dlse)).sum((0, 2, 3)))
    ds = compat.softmax_backward(dp, prob)  # delta is sum P dP, and not that of O * dO, as O was rounded
    if dlse is not None:  # d lse / d s = p
        ds.addcmul_(prob, dlse)
    _from_logits(tiles, tile, q, tile.fill(ds, 0.0) if tiles.careful else ds, grads)


def _from_logits(tiles: Tiles, tile: Tile, q: Tensor, ds: Tensor, grads: Gradients) -> None:
    """What the gradient of a tile's logits brings to those of what they are made of."""
    if grads.bias is not None:
        tiles.add_dbias(grads.bias, ds, tile)
    if grads.slopes is not None:
        by_distance = ds.flatten(2) @ tiles.distance(tile).flatten()
        grads.slopes.sub_(by_distance.sum_to_size(grads.slopes.shape))
    if tile.slope is not None:
        ds.mul_(tile.slope)
        ds = tile.fill(ds, 0.0) if tiles.careful else ds
    ds = tiles.fold(ds)
    if grads.q is not None:
        k = _hide_unseen(tiles, tile, tiles.k[:, :, tile.keys])
        grads.q[:, :, tile.rows] = tiles.unfold(ds @ k) * tiles.scale  # [rows, keys] @ [keys, D]
    if grads.k is not None:
        grads.k[:, :, tile.keys] += ds.mT @ q  # [keys, rows] @ [rows, D]; q has the scale
