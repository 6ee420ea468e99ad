"""The tiles of the backend eager: some rows of queries of some heads, all keys that they see, and their scores.

Logits, weights and the gradients of logits are shaped (B, H, rows, keys). Products are batched over (B, Hkv), with the heads
of a group folded into the rows. So a product sums the gradients of shared keys over the group.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import band, dropout
from tfkern.problem import Problem, Tensors
from tfkern.score_mods import each_head

CACHED = 1 << 18  # scores of a tile on a CPU for each thread: 1 MiB of float32, which stays in its L2 cache
ELEMENTS = 1 << 22  # scores of a tile elsewhere
# The least number of rows of a tile, if there are that many: the cost of a score (measured). Few rows make the overhead of a
# tile weigh more. Many rows see more keys together, some of which the band hides from single rows.
STEPS = {64: 1.3, 128: 1.12, 256: 1.06, 512: 1.0}
LARGEST = 1e37  # sums of products below this are finite in float32


class Part(NamedTuple):
    """Sequences and heads of a dense problem that are computed together: the sequences' numbers, and slices of batch, heads and
    key heads."""

    numbers: Sequence[int]
    batch: slice
    heads: slice
    kv_heads: slice

    def of(self, x: Tensor | None) -> Tensor | None:
        """The part of a tensor (B or 1, H or 1, …), a view."""
        if x is None:
            return None
        return x[self.batch if x.shape[0] > 1 else slice(None), self.heads if x.shape[1] > 1 else slice(None)]


def parts(p: Problem, numbers: Sequence[int]) -> Iterator[Part]:
    """The parts of a dense problem. On a CPU their tiles fit into the cache."""
    if min(p.batch, p.heads, p.n_q, p.n_k) == 0:
        return
    batch, kv_heads = p.batch, p.kv_heads
    if p.device.type == "cpu":
        rows = _least(p)
        fit = max(1, _elements(p) // (rows * _most(p, rows) * p.group))  # key heads
        kv_heads, batch = min(fit, p.kv_heads), max(1, min(fit // p.kv_heads, p.batch))
    for b in range(0, p.batch, batch):
        for h in range(0, p.kv_heads, kv_heads):
            kv = slice(h, min(h + kv_heads, p.kv_heads))
            heads = slice(kv.start * p.group, kv.stop * p.group)
            yield Part(numbers[b : b + batch], slice(b, b + batch), heads, kv)


def _elements(p: Problem) -> int:
    return CACHED * torch.get_num_threads() if p.device.type == "cpu" else ELEMENTS


def _least(p: Problem) -> int:
    """The least number of rows of a tile on a CPU."""
    rows = band.step(p, STEPS)
    return min(p.n_q, rows, max(min(STEPS), ELEMENTS // (2 * _most(p, rows))))


def _most(p: Problem, rows: int) -> int:
    """The most keys that `rows` neighbouring queries see together."""
    if p.left is None or p.right is None:
        return p.n_k
    return min(p.n_k, rows + p.left + p.right)


class Scratch:
    """Memory for the scores of a tile, which the tiles use one after another: it stays in the cache, and its pages are
    mapped."""

    def __init__(self, p: Problem):
        self.options = dict(dtype=p.lse_dtype, device=p.device)
        self.flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised, dense; the same memory each time for one name."""
        size = math.prod(shape)
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = torch.empty(size, **self.options)
        return self.flat[name][:size].view(shape)


class Care(NamedTuple):
    """What is known of the values of a group. `bias_hides`: its bias may have -inf. `needed`: hidden places may hold NaN or
    inf, or a sum may overflow. On a GPU both are assumed, because looking would wait for its stream."""

    bias_hides: bool
    needed: bool


def care_for(p: Problem, t: Tensors, do: Tensor | None = None, dlse: Tensor | None = None) -> Care:
    """The Care for a forward, or with do for a backward."""
    on_cpu = p.device.type == "cpu"
    bias_hides = t.bias is not None and t.bias.numel() > 0 and not (on_cpu and t.bias.amin() > -math.inf)
    if not (bias_hides or p.mask or p.left is not None or p.right is not None):  # nothing is hidden
        return Care(False, False)
    scale = t.scale if p.scale is None else p.scale
    bounded = (
        on_cpu and p.score_mod is None and _product(t.q, t.k, scale) < LARGEST and _largest(t.v) < LARGEST
        and not (bias_hides and not t.bias.amax() < math.inf)
        and (do is None or _product(do, t.v, 1.0) < LARGEST) and (dlse is None or _largest(dlse) < LARGEST)
    )  # fmt: skip
    return Care(bias_hides, not bounded)


def _product(x: Tensor, y: Tensor, scale) -> float:
    """A bound of the scaled products of rows of x and y; NaN if x or y has one."""
    return _largest(x) * _largest(y) * abs(float(scale)) * x.shape[-1]


def _largest(x: Tensor) -> float:
    return max(map(abs, map(float, x.aminmax()))) if x.numel() else 0.0


@dataclass
class Tile:
    """Query rows and key columns, as slices. `hidden`: pairs of a slice of columns and a bool tensor (B or 1, H or 1, rows,
    columns), True where they are hidden; all other places are visible. `slope`: d logits / d (scale * q . k), None where it
    is 1 or not computed yet."""

    rows: slice
    keys: slice
    hidden: list[tuple[slice, Tensor]]
    slope: Tensor | None = None

    def fill(self, x: Tensor, value: float) -> Tensor:
        """x with a value in its hidden places, in place."""
        for columns, hidden in self.hidden:
            x[..., columns].masked_fill_(hidden, value)
        return x

    def hide(self, s: Tensor) -> Tensor:
        """s with -inf in its hidden places, in place. s must be finite."""
        for columns, hidden in self.hidden:
            seen = 1.0 - hidden.to(s.dtype)
            s[..., columns] += seen.reciprocal_().neg_().add_(1.0)  # -inf or 0, in a quarter of the time of filling
        return s


class Tiles:
    """A part of a dense problem, tile by tile. k, v and all operands of products are matrices (B * Hkv, rows, columns), in
    which the rows of a group's heads lie one after another."""

    def __init__(self, p: Problem, t: Tensors, part: Part, care: Care, scratch: Scratch):
        self.p, self.part, self.care, self.scratch = p, part, care, scratch
        self.q, self.bias, self.mask, self.slopes = (part.of(x) for x in (t.q, t.bias, t.mask, t.slopes))
        self.batch, self.heads = self.q.shape[:2]
        self.matrices = self.batch * (self.heads // p.group)
        self.k, self.v = (x[part.batch, part.kv_heads].to(p.lse_dtype).flatten(0, 1) for x in (t.k, t.v))
        self.sinks = None if t.sinks is None else t.sinks[part.heads, None].to(p.lse_dtype)
        self.seed = t.seed
        # A scale that is a tensor is multiplied into q, because baddbmm takes numbers only.
        self.scale, self.scale_tensor = (1.0, t.scale) if p.scale is None else (p.scale, None)
        self.shift = band.shift_of(p)
        least = _least(p)
        fit = _elements(p) // max(1, self.batch * self.heads * _most(p, least))
        self.step = max(1, min(p.n_q, max(fit, least if p.device.type == "cpu" else 1)))

    def __iter__(self) -> Iterator[Tile]:
        """The tiles of the rows that may see a key."""
        rows = band.alive(self.p)
        for start in range(rows.start, rows.stop, self.step):
            stop = min(start + self.step, rows.stop)
            rows_, keys = slice(start, stop), band.keys_of(self.p, slice(start, stop))
            yield Tile(rows_, keys, self._hidden(rows_, keys))

    def fold(self, x: Tensor) -> Tensor:
        """(B, H, rows, …) as matrices; a view of `scores`."""
        return x.reshape(self.matrices, self.p.group * x.shape[2], x.shape[3])

    def unfold(self, x: Tensor) -> Tensor:
        """Matrices of `scores` as (B, H, rows, keys), a view."""
        return x.view(self.batch, self.heads, -1, x.shape[2])

    def scores(self, name: str, tile: Tile) -> Tensor:
        """Memory for a number for each query and key of the tile, as matrices."""
        rows, keys = (at.stop - at.start for at in (tile.rows, tile.keys))
        return self.scratch.take(name, self.matrices, self.p.group * rows, keys)

    def queries(self, tile: Tile) -> Tensor:
        """The tile's queries as matrices, multiplied by the scale if that is a tensor."""
        q = self.fold(self.q[:, :, tile.rows].to(self.p.lse_dtype))
        return q if self.scale_tensor is None else q * self.scale_tensor

    def logits(self, tile: Tile, q: Tensor, want_slope: bool = False) -> Tensor:
        """The logits (B, H, rows, keys) of q, which `queries` returned, with -inf in hidden places, as kernels/score.py
        computes them. Sets the tile's slope if wanted."""
        p, keys = self.p, self.k[:, tile.keys].mT
        matrices = self.scores("scores", tile)
        s = self.unfold(matrices)
        if p.softcap is None and p.score_mod is None:
            several = self._begin(s, tile)
            matrices.baddbmm_(q, keys, beta=float(several), alpha=self.scale)  # [rows, D] @ [D, keys]
        else:
            matrices.baddbmm_(q, keys, beta=0.0, alpha=self.scale)  # [rows, D] @ [D, keys]
            s = self._changed(s, tile, want_slope)
            self._add(s, tile)
        return tile.fill(s, -math.inf) if self.care.needed else tile.hide(s)

    def _changed(self, s: Tensor, tile: Tile, want_slope: bool) -> Tensor:
        """The scores after softcap (in place) and score_mod. Sets the tile's slope."""
        p, slope = self.p, None
        if p.softcap is not None:
            s.div_(p.softcap).tanh_()
            if want_slope:
                slope = torch.addcmul(s.new_ones(()), s, s, value=-1.0, out=self.unfold(self.scores("slopes", tile)))
            s.mul_(p.softcap)
        if p.score_mod is not None:
            value, derivative = p.score_mod
            place = self.part.numbers, self.part.heads.start, *self._offsets(tile)
            if want_slope:
                own = each_head(derivative, s, *place)
                slope = own if slope is None else own.mul_(slope)
            s = each_head(value, s, *place)
        tile.slope = slope
        return s

    def _begin(self, s: Tensor, tile: Tile) -> bool:
        """Write bias and ALiBi into s, to which the products are then added. False where there is neither."""
        if self.bias is not None:
            s.copy_(band.of_tile(self.bias, tile.rows, tile.keys))
        elif self.slopes is not None:
            s.zero_()
        self._add_slopes(s, tile)
        return self.bias is not None or self.slopes is not None

    def _add(self, s: Tensor, tile: Tile) -> None:
        if self.bias is not None:
            s.add_(band.of_tile(self.bias, tile.rows, tile.keys))
        self._add_slopes(s, tile)

    def _add_slopes(self, s: Tensor, tile: Tile) -> None:
        if self.slopes is not None:
            s.addcmul_(self.slopes.to(s.dtype)[:, :, None, None], self.distance(tile), value=-1.0)

    def distance(self, tile: Tile) -> Tensor:
        """|i + shift - j|, (rows, keys)."""
        i, j = band.places(self.p, tile.rows, tile.keys)
        return (i - j).abs().to(self.p.lse_dtype)

    def kept(self, tile: Tile) -> Tensor | None:
        """(B, H, rows, keys): 1 where dropout keeps a weight, else 0. None without dropout."""
        p = self.p
        if not p.dropout_p:
            return None
        b = torch.tensor(self.part.numbers, device=p.device)[:, None, None, None]
        h = torch.arange(self.part.heads.start, self.part.heads.stop, device=p.device)[:, None, None]
        rows = self._offsets(tile)[0]
        return dropout.keep(self.seed, p.dropout_p, b * p.heads + h, rows, tile.keys.start, tile.keys.stop, self.p.lse_dtype)

    def unseen(self, tile: Tile) -> Tensor | None:
        """(B * Hkv, keys, 1) bool: keys that a mask hides from all queries of the tile; None without a mask. (Keys that the
        band hides from all of them are in no tile.)"""
        if not self.masked:
            return None
        hidden = tile.fill(self._all_false(tile), True).all(2)
        return hidden.view(self.matrices, self.p.group, -1).all(1)[..., None]

    @property
    def masked(self) -> bool:
        """Whether more than the band may hide something, so that a tile may have rows that see no key."""
        return self.mask is not None or self.care.bias_hides

    def add_dbias(self, dbias: Tensor, ds: Tensor, tile: Tile) -> None:
        """Add ds to the part's gradient of the bias, summed over the dims along which the bias broadcasts."""
        part = band.of_tile(dbias, tile.rows, tile.keys)
        part += ds.sum_to_size(part.shape)

    def _all_false(self, tile: Tile) -> Tensor:
        shape = self.batch, self.heads, tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        return torch.zeros(shape, dtype=torch.bool, device=self.p.device)

    def _offsets(self, tile: Tile) -> tuple[Tensor, Tensor]:
        rows, keys, device = tile.rows, tile.keys, self.p.device
        return torch.arange(rows.start, rows.stop, device=device)[:, None], torch.arange(keys.start, keys.stop, device=device)

    def _hidden(self, rows: slice, keys: slice) -> list[tuple[slice, Tensor]]:
        masks = [] if self.mask is None else [~band.of_tile(self.mask, rows, keys)]
        if self.care.bias_hides:
            masks.append(band.of_tile(self.bias, rows, keys) == -math.inf)
        if not masks:
            return [
                (slice(*cut), band.hidden(self.p, rows, slice(*(keys.start + x for x in cut))))
                for cut in self._cuts(rows, keys)
            ]
        if self._cuts(rows, keys):
            masks.append(band.hidden(self.p, rows, keys))
        hidden = functools.reduce(torch.logical_or, masks)
        return [(slice(None), hidden.expand(-1, -1, rows.stop - rows.start, keys.stop - keys.start))]

    def _cuts(self, rows: slice, keys: slice) -> list[tuple[int, int]]:
        """Ranges of the tile's columns that the band hides from some of its rows: at the left, at the right, or all columns."""
        p, count = self.p, keys.stop - keys.start
        left = 0 if p.left is None else rows.stop - 1 + self.shift - p.left - keys.start
        right = count if p.right is None else rows.start + self.shift + p.right + 1 - keys.start
        if left > 0 and right < count and left >= right:
            return [(0, count)]
        cuts = [(0, min(left, count)), (max(right, 0), count)]
        return [(lo, hi) for lo, hi in cuts if lo < hi]
