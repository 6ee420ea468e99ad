"""What the eager backend holds at once: some rows of queries against all the keys that they need, and their scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tfkern import dropout
from tfkern.problem import Problem, Tensors
from tfkern.score_mods import each_head

ELEMENTS = 1 << 22  # scores held at once: 16 MiB of float32, unless one row of queries alone has more


@dataclass
class Tile:
    """Query rows and key columns, as slices; where the query sees the key (B or 1, H or 1, rows, keys), None for everywhere;
    dropout's factor of each probability; and d logits / d (scale * q . k), None for 1 and until the logits were asked for."""

    rows: slice
    keys: slice
    keep: Tensor | None
    kept: Tensor | None
    slope: Tensor | None = None

    def only_seen(self, x: Tensor) -> Tensor:
        return x if self.keep is None else x.masked_fill(~self.keep, 0.0)


class Tiles:
    """One problem, tile by tile. Products are batched over (B, Hkv), the heads of a group folded into rows, so that gradients
    of shared keys add up by themselves; what happens between products is shaped (B, H, rows, keys). `first` is the number of
    the first sequence."""

    def __init__(self, p: Problem, t: Tensors, first: int):
        self.p, self.t, self.first = p, t, first
        self.lengths = None if t.key_lengths is None else t.key_lengths.clamp(0, p.n_k).view(-1, 1, 1, 1)
        elements = ELEMENTS // 8 if p.heavy else ELEMENTS  # features hold several tiles at once
        self.step = max(1, min(p.n_q, elements // max(1, p.batch * p.heads * p.n_k)))
        self.compute = p.lse_dtype
        self.banded = p.left is not None or p.right is not None or p.has_key_lengths
        self.k, self.v = self._readable(t.k), self._readable(t.v)

    def __iter__(self) -> Iterator[Tile]:
        p = self.p
        if min(p.batch, p.heads, p.n_q) == 0:
            return
        for start in range(0, p.n_q, self.step):
            stop = min(start + self.step, p.n_q)
            rows, keys = slice(start, stop), slice(*self._key_range(start, stop))
            yield Tile(rows, keys, self._keep(rows, keys), self._kept(rows, keys))

    def fold(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's rows of (B, H, Nq, D) as (B, Hkv, group * rows, D) in the wide dtype."""
        return self.refold(x[:, :, tile.rows].to(self.compute))

    def refold(self, x: Tensor) -> Tensor:
        return x.reshape(self.p.batch, self.p.kv_heads, self.p.group * x.shape[2], x.shape[3])

    def unfold(self, x: Tensor) -> Tensor:
        """(B, Hkv, group * rows, D) as (B, H, rows, D)."""
        return x.reshape(self.p.batch, self.p.heads, x.shape[2] // self.p.group, x.shape[3])

    def hide_unseen(self, x: Tensor, tile: Tile) -> Tensor:
        """Keys or values of the tile (B, Hkv, keys, D) with 0 where a mask hides them from all of its queries. (What the band
        hides is 0 already.)"""
        if tile.keep is None or (self.t.mask is None and self.t.bias is None):
            return x
        seen = tile.keep.any(2).expand(self.p.batch, self.p.heads, -1)
        seen = seen.reshape(self.p.batch, self.p.kv_heads, self.p.group, -1).any(2)
        return x.masked_fill(~seen[..., None], 0.0)

    def hide_dead(self, x: Tensor, tile: Tile) -> Tensor:
        """Folded rows with 0 where the query sees no key of the tile, which are all that it may see."""
        if tile.keep is None:
            return x if self.p.n_k else torch.zeros_like(x)
        seen = tile.keep.any(3, keepdim=True).expand(self.p.batch, self.p.heads, -1, -1)
        return x.masked_fill(~self.refold(seen), 0.0)

    def logits(self, tile: Tile, q: Tensor, want_slope: bool = False) -> Tensor:
        """(B, H, rows, keys) of folded queries, -inf where not seen, as kernels/score.py; sets the tile's slope if wanted."""
        p, t = self.p, self.t
        s = self.unfold(q @ self.k[:, :, tile.keys].mT)  # [rows, D] @ [D, keys]
        s = s * (p.scale if p.scale is not None else t.scale)
        slope = None
        if p.softcap is not None:
            y = torch.tanh(s / p.softcap)
            s = y * p.softcap
            slope = 1.0 - y * y
        if p.score_mod is not None:
            value, derivative = p.score_mod
            place = (self.first, *self._offsets(tile.rows, tile.keys))
            if want_slope:
                slope = each_head(derivative, s, *place) * (1.0 if slope is None else slope)
            s = each_head(value, s, *place)
        if t.slopes is not None:
            s = s - t.slopes.to(s.dtype)[:, :, None, None] * self.distance(tile)
        if t.bias is not None:
            s = s + self._mask_tile(t.bias, tile.rows, tile.keys).to(s.dtype)
        tile.slope = slope if want_slope else None
        return s if tile.keep is None else s.masked_fill(~tile.keep, -torch.inf)

    def distance(self, tile: Tile) -> Tensor:
        """|i + shift - j|, (B or 1, 1, rows, keys)."""
        i, j = self._offsets(tile.rows, tile.keys)
        return (i + self._shift() - j).abs().to(self.compute)

    def add_dbias(self, dbias: Tensor, ds: Tensor, tile: Tile) -> None:
        """Add the tile's ds to the gradient of the bias, summed over the dims along which that broadcasts."""
        part = self._mask_tile(dbias, tile.rows, tile.keys)
        part += ds.sum_to_size(part.shape)

    def _mask_tile(self, x: Tensor, rows: slice, keys: slice) -> Tensor:
        return x[:, :, rows if x.shape[2] > 1 else slice(None), keys if x.shape[3] > 1 else slice(None)]

    def _heads(self) -> tuple[Tensor, Tensor]:
        b = torch.arange(self.first, self.first + self.p.batch, device=self.p.device)
        h = torch.arange(self.p.heads, device=self.p.device)
        return b[:, None, None, None], h[:, None, None]

    def _offsets(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        device = self.p.device
        return torch.arange(rows.start, rows.stop, device=device)[:, None], torch.arange(keys.start, keys.stop, device=device)

    def _count(self):
        return self.p.n_k if self.lengths is None else self.lengths

    def _shift(self):
        return self._count() - self.p.n_q if self.p.lower_right else 0

    def _readable(self, x: Tensor) -> Tensor:
        """Keys or values for computing: in the wide dtype, with 0 where the band hides them from all, whatever stood there."""
        x = x.to(self.compute)
        if not self.banded:
            return x
        p, j = self.p, torch.arange(self.p.n_k, device=x.device)
        unseen = j >= self._count()
        if p.left is not None:
            unseen = unseen | (j < self._shift() - p.left)
        if p.right is not None:
            unseen = unseen | (j >= p.n_q + self._shift() + p.right)
        return x.masked_fill(unseen[(None,) * (4 - unseen.dim())].mT, 0.0)

    def _key_range(self, start: int, stop: int) -> tuple[int, int]:
        p = self.p
        if p.lower_right and p.has_key_lengths:
            return 0, p.n_k  # each batch is shifted by its own length, which only the device knows
        shift = p.n_k - p.n_q if p.lower_right else 0
        lo = 0 if p.left is None else min(max(start + shift - p.left, 0), p.n_k)
        hi = p.n_k if p.right is None else min(max(stop + shift + p.right, lo), p.n_k)
        return lo, hi

    def _keep(self, rows: slice, keys: slice) -> Tensor | None:
        p, t, keep = self.p, self.t, None
        if self.banded:
            i, j = self._offsets(rows, keys)
            i = i + self._shift()
            keep = j < self._count()
            if p.left is not None:
                keep = keep & (j >= i - p.left)
            if p.right is not None:
                keep = keep & (j <= i + p.right)
        if t.mask is not None:
            seen = self._mask_tile(t.mask, rows, keys)
            keep = seen if keep is None else keep & seen
        if t.bias is not None:
            seen = self._mask_tile(t.bias, rows, keys) != -torch.inf
            keep = seen if keep is None else keep & seen
        if keep is None:
            return None
        keep = keep[(None,) * (4 - keep.dim())]
        return keep.expand(-1, -1, rows.stop - rows.start, keys.stop - keys.start)

    def _kept(self, rows: slice, keys: slice) -> Tensor | None:
        p = self.p
        if not p.dropout_p:
            return None
        b, h = self._heads()
        kept = dropout.keep(self.t.seed, p.dropout_p, b * p.heads + h, self._offsets(rows, keys)[0], keys.start, keys.stop)
        return kept * dropout.factor(p.dropout_p)
