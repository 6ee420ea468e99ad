"""Packed sequences, or a batch with key lengths, as dense problems: groups of neighbouring sequences of equal lengths, each
with just its own keys.

Groups are views. Many short sequences of mixed lengths would make many groups. They are copied once into an order by length
(sequences.py), and their results are copied back.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import layout
from tfkern.problem import Gradients, Problem, Tensors, stats_of
from tfkern.sequences import Places, order_of, places_of

MANY_PLANS = 4096


class Rows(NamedTuple):
    """Where a group's rows lie in (B, H, N, …), or in (1, H, total, …) if packed. `packed`: (sequences, rows of each)."""

    batch: slice
    rows: slice
    packed: tuple[int, int] | None = None

    def of(self, x: Tensor | None) -> Tensor | None:
        """The group's part of x, a view (S, H, n, …)."""
        if x is None:
            return None
        if self.packed is None:
            return x[self.batch, :, self.rows]
        (sequences, count), (_, head, row, *more) = self.packed, x.stride()
        strides = count * row, head, row, *more
        return x.as_strided((sequences, x.shape[1], count, *x.shape[3:]), strides, x.storage_offset() + self.rows.start * row)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write (S, H, n, …) into its place in x."""
        self.of(x).copy_(part)

    def whole(self, part: Tensor) -> Tensor:
        """The part (S, H, n, …) of a group that has all rows, in the shape of the whole."""
        return part if self.packed is None else part.transpose(0, 1).flatten(1, 2)[None]

    def count(self) -> int:
        """The number of rows: of each sequence, or of all if packed."""
        return self.rows.stop - self.rows.start


class Group(NamedTuple):
    """A dense problem and its tensors. `numbers`: its sequences' numbers in the whole problem. `batch`: their slice of whatever
    has one entry for each sequence. `queries` and `keys`: where their rows lie."""

    problem: Problem
    tensors: Tensors
    numbers: Sequence[int]
    batch: slice
    queries: Rows
    keys: Rows

    def of_each(self, x: Tensor | None) -> Tensor | None:
        """The group's part of a bias, mask or slopes, a view."""
        if x is None:
            return None
        x = x if len(x) == 1 else x[self.batch]
        return x if x.dim() == 2 else x[:, :, : self.problem.n_q, : self.problem.n_k]


def dense(p: Problem, t: Tensors) -> Group | None:
    """A problem without lengths as one group; None for others."""
    if p.packed or p.has_key_lengths:
        return None
    whole = slice(0, p.batch)
    return Group(p, t, range(p.batch), whole, Rows(whole, slice(0, p.n_q)), Rows(whole, slice(0, p.n_k)))


def groups(p: Problem, t: Tensors, places: Places, numbers: Sequence[int]) -> Iterator[Group]:
    """The groups of a problem. Together they have each query of each sequence once. `numbers`: the sequences' numbers."""
    starts, sizes = places.starts, places.sizes
    for batch in places.runs:
        part = _of_sizes(p, batch.stop - batch.start, *sizes[batch.start])
        queries, keys = (
            _rows(p, batch, n, None if starts is None else starts[batch.start][i]) for i, n in enumerate(sizes[batch.start])
        )
        group = Group(part, t, numbers[batch], batch, queries, keys)
        each = {name: group.of_each(getattr(t, name)) for name in ("bias", "mask", "slopes")}
        rows = dict(q=queries.of(t.q), k=keys.of(t.k), v=keys.of(t.v))
        yield group._replace(tensors=t._replace(**rows, **each, key_lengths=None, cu_q=None, cu_k=None))


def _rows(p: Problem, batch: slice, count: int, start: int | None) -> Rows:
    """Where `count` rows of each sequence of the batch lie. `start`: the first of them if packed."""
    if start is None:
        return Rows(batch, slice(0, count))
    sequences = batch.stop - batch.start
    return Rows(slice(None), slice(start, start + count * sequences), (sequences, count))


def _of_sizes(p: Problem, batch: int, n_q: int, n_k: int) -> Problem:
    """The problem without lengths, of other sizes."""
    key = batch, n_q, n_k
    if key not in p.plans:
        if len(p.plans) >= MANY_PLANS:
            p.plans.clear()
        shapes = {
            name: (min(shape[0], batch), shape[1], min(shape[2], n_q), min(shape[3], n_k))
            for name in ("mask", "bias") if (shape := getattr(p, name))
        }  # fmt: skip
        sizes = dict(batch=batch, n_q=n_q, n_k=n_k, packed=False, has_key_lengths=False)
        p.plans[key] = dataclasses.replace(p, **sizes, **shapes, plans={})
    return p.plans[key]


def results(p: Problem, t: Tensors, of_group: Callable) -> tuple[Tensor, Tensor]:
    """out in q's memory order and stats (B, H, stats_rows, Nq). `of_group(group)` gives out and lse of a group."""
    out, lse = joined(p, t, of_group)
    return layout.like_order(out, t.q), stats_of(lse, p.stats_rows)


def joined(p: Problem, t: Tensors, of_group: Callable) -> tuple[Tensor, Tensor]:
    """out in any memory order and lse (B, H, Nq)."""
    if (group := dense(p, t)) is not None:
        return of_group(group)
    places = places_of(p, t)
    order, *which = order_of(p, t, places) or (None, places, range(p.batch))
    if order is None:
        return _results(p, t, of_group, *which)
    return tuple(map(order.back().of, _results(p, order.tensors(t), of_group, *which)))


def _results(p: Problem, t: Tensors, of_group: Callable, places: Places, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """out in any memory order and lse (B, H, Nq)."""
    parts = list(groups(p, t, places, numbers))
    if len(parts) == 1 and places.all_queries:
        return tuple(map(parts[0].queries.whole, of_group(parts[0])))
    out = layout.empty_in_order_of(t.q, p.v_head_dim)
    lse = torch.empty(t.q.shape[:3], dtype=p.lse_dtype, device=p.device)
    if not places.all_queries:
        out.zero_(), lse.fill_(-math.inf)
    for group in parts:
        for x, part in zip((out, lse), of_group(group), strict=True):
            group.queries.put(x, part)
    return out, lse


def gradients(p: Problem, t: Tensors, needed, into, of_group: Callable, *rows: Tensor | None) -> Gradients:
    """The needed gradients. `of_group(group, *rows)` gives those of a group, those of q, k and v in any dtype; `rows` have the
    queries in their dim 2, and it gets their parts."""
    group = dense(p, t)
    found = _added(p, t, needed, of_group, rows) if group is None else of_group(group, *rows)
    own = [
        None if g is None else layout.deliver(g, x, place)
        for g, x, place in zip(found[:3], t[:3], into or (None,) * 3, strict=True)
    ]
    return Gradients(*own, *(None if g is None else g.to(x.dtype) for g, x in zip(found[3:], t[3:6], strict=True)))


def _added(p: Problem, t: Tensors, needed, of_group: Callable, rows) -> Gradients:
    """The gradients of a problem with lengths: those of q, k and v in any memory order, the others in the wide dtype."""
    places = places_of(p, t)
    order, *which = order_of(p, t, places) or (None, places, range(p.batch))
    if order is None:
        return _gradients(p, t, needed, of_group, rows, *which)
    found = _gradients(p, order.tensors(t), needed, of_group, [order.of(x) for x in rows], *which)
    back = order.back()
    own = back.of(found.q), back.of_keys(found.k), back.of_keys(found.v)
    return Gradients(*own, *map(back.of_each, found[3:5]), found.sinks)


def _gradients(p: Problem, t: Tensors, needed, of_group: Callable, rows, places: Places, numbers: Sequence[int]) -> Gradients:
    """The gradients of the groups, put together: those of q, k and v in any memory order, the others in the wide dtype."""
    parts = list(groups(p, t, places, numbers))
    if len(parts) == 1 and places.all_queries and places.all_keys:
        group = parts[0]
        found = of_group(group, *map(group.queries.of, rows))
        at = group.queries, group.keys, group.keys
        return Gradients(*(None if g is None else at_.whole(g) for at_, g in zip(at, found[:3], strict=True)), *found[3:])
    own = [layout.empty_in_order_of(x, x.shape[-1]) if need else None for x, need in zip(t[:3], needed, strict=False)]
    for x, whole in zip(own, (places.all_queries, places.all_keys, places.all_keys), strict=True):
        if x is not None and not whole:
            x.zero_()
    sums = [torch.zeros_like(x, dtype=p.lse_dtype) if need else None for x, need in zip(t[3:6], needed[3:], strict=True)]
    for group in parts:
        found = of_group(group, *map(group.queries.of, rows))
        for at_, x, part in zip((group.queries, group.keys, group.keys), own, found, strict=False):
            if x is not None:
                at_.put(x, part)
        for x, part in zip(sums[:2], found[3:5], strict=True):
            if x is not None:
                group.of_each(x).add_(part)
        if sums[2] is not None:
            sums[2].add_(found.sinks)
    return Gradients(*own, *sums)


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def without_autocast(function):
    """Keep autocast, which may be on around a backend's forward or backward, from narrowing its products."""

    @functools.wraps(function)
    def wrapped(problem, *args, **kwargs):
        kind = problem.device.type
        if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
            return function(problem, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(problem, *args, **kwargs)

    return wrapped
