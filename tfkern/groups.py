"""A problem as dense ones: packed sequences, or a batch with key lengths, as groups of equal lengths with just their own keys.

The lengths are read, for which a GPU's stream is waited for. Groups are views where their sequences lie side by side in memory,
and copies of short sequences that don't, so that many of those need few calls.
"""

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import layout
from tfkern.problem import Gradients, Problem, Tensors, stats_of

FEW = 1 << 16  # scores of a run of sequences, beside which a call of their own costs little
MANY_PLANS = 4096


class Rows(NamedTuple):
    """Where a group's rows lie in (B, H, N, …); or in (1, H, total, …), where `packed` tells how many sequences they are, and
    of how many rows."""

    batch: slice | Tensor
    rows: slice | Tensor
    packed: tuple[int, int] | None = None

    def of(self, x: Tensor | None) -> Tensor | None:
        """x of the group, (S, H, n, …): a view where the rows lie side by side."""
        if x is None:
            return None
        if self.packed is None:
            return x[self.batch, :, self.rows]
        return x[0, :, self.rows].unflatten(1, self.packed).transpose(0, 1)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write (S, H, n, …) into its place in x."""
        if isinstance(self.batch, slice) and isinstance(self.rows, slice):
            self.of(x).copy_(part)
        elif self.packed is None:
            x[self.batch, :, self.rows] = part.to(x.dtype)
        else:
            x[0, :, self.rows] = part.transpose(0, 1).flatten(1, 2).to(x.dtype)


class Group(NamedTuple):
    """A dense problem, its tensors, the numbers of its sequences, their places in whatever has one entry for each sequence, and
    those of their rows."""

    problem: Problem
    tensors: Tensors
    numbers: list[int] | range
    batch: slice | Tensor
    queries: Rows
    keys: Rows

    def of_each(self, x: Tensor | None) -> Tensor | None:
        """The group's part of a bias, mask or slopes; a view unless its sequences are not neighbours."""
        if x is None:
            return None
        x = x if len(x) == 1 else x[self.batch]
        return x if x.dim() == 2 else x[:, :, : self.problem.n_q, : self.problem.n_k]

    def add_each(self, x: Tensor, part: Tensor) -> None:
        """Add what a group has for its part of a bias or slopes."""
        if len(x) == 1 or isinstance(self.batch, slice):
            self.of_each(x).add_(part)
        else:
            x[(self.batch, *(slice(n) for n in part.shape[1:]))] = part


def groups(p: Problem, t: Tensors) -> Iterator[Group]:
    """Together they have every query that belongs to a sequence, each once."""
    if not (p.packed or p.has_key_lengths):
        whole = Rows(slice(None), slice(None))
        yield Group(p, t, range(p.batch), slice(None), whole, whole)
        return
    starts, sizes = _places(p, t)
    alike = defaultdict(list)
    for b, size in enumerate(sizes):
        alike[size].append(b)
    for size, numbers in alike.items():
        runs = _runs(numbers, size, starts)
        if len(runs) > 1 and p.heads * size[0] * size[1] * len(numbers) < FEW * len(runs):
            runs = [numbers]
        yield from (_group(p, t, run, size, starts) for run in runs)


def _places(p: Problem, t: Tensors) -> tuple[list[tuple[int, int]] | None, list[tuple[int, int]]]:
    """Of each sequence, where its queries and keys start in packed memory, and how many there are of each. Whatever the values
    are that nobody checked, these are within the tensors."""
    if not p.packed:
        return None, [(p.n_q, n) for n in t.key_lengths.clamp(0, p.n_k).tolist()]
    cu_q, cu_k = t.cu_q.clamp(0, p.n_q).tolist(), t.cu_k.clamp(0, p.n_k).tolist()
    sizes = [(max(q1 - q0, 0), max(k1 - k0, 0)) for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)]
    return list(zip(cu_q, cu_k, strict=True)), sizes


def _runs(numbers: list[int], size: tuple[int, int], starts: list[tuple[int, int]] | None) -> list[list[int]]:
    """The sequences as lists of neighbours, in the batch or in packed memory."""
    runs = [[numbers[0]]]
    for a, b in itertools.pairwise(numbers):
        if b == a + 1 and (starts is None or all(starts[b][i] == starts[a][i] + size[i] for i in (0, 1))):
            runs[-1].append(b)
        else:
            runs.append([b])
    return runs


def _group(p: Problem, t: Tensors, numbers: list[int], size: tuple[int, int], starts: list[tuple[int, int]]) -> Group:
    adjacent = len(_runs(numbers, size, starts)) == 1
    batch = slice(numbers[0], numbers[-1] + 1) if adjacent else torch.tensor(numbers, device=p.device)
    part = _of_sizes(p, len(numbers), *size)
    if p.packed:
        queries, keys = (
            Rows(slice(None), _packed_rows([starts[b][i] for b in numbers], n, adjacent, p.device), (len(numbers), n))
            for i, n in enumerate(size)
        )
    else:
        queries, keys = Rows(batch, slice(None)), Rows(batch, slice(0, size[1]))
    group = Group(part, t, numbers, batch, queries, keys)
    each = {name: group.of_each(getattr(t, name)) for name in ("bias", "mask", "slopes")}
    rows = dict(q=queries.of(t.q), k=keys.of(t.k), v=keys.of(t.v))
    return group._replace(tensors=t._replace(**rows, **each, key_lengths=None, cu_q=None, cu_k=None))


def _packed_rows(starts: list[int], size: int, adjacent: bool, device: torch.device) -> slice | Tensor:
    """The rows of sequences of one size."""
    if adjacent:
        return slice(starts[0], starts[0] + size * len(starts))
    return (torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device)).flatten()


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
    if not (p.packed or p.has_key_lengths):
        (whole,) = groups(p, t)
        out, lse = of_group(whole)
        return layout.like_order(out, t.q), stats_of(lse, p.stats_rows)
    out = layout.empty_in_order_of(t.q, p.v_head_dim).zero_()
    lse = torch.full(t.q.shape[:3], -math.inf, dtype=p.lse_dtype, device=p.device)
    for group in groups(p, t):
        for x, part in zip((out, lse), of_group(group), strict=True):
            group.queries.put(x, part)
    return out, stats_of(lse, p.stats_rows)


def gradients(p: Problem, t: Tensors, needed, into, of_group: Callable) -> Gradients:
    """The needed gradients. `of_group(group)` gives those of a group, those of q, k and v in any dtype."""
    into = into or (None,) * 3
    if not (p.packed or p.has_key_lengths):
        (whole,) = groups(p, t)
        found = of_group(whole)
        rows = [None if g is None else layout.deliver(g, x, i) for g, x, i in zip(found[:3], t[:3], into, strict=True)]
        return Gradients(*rows, *(None if g is None else g.to(x.dtype) for g, x in zip(found[3:], t[3:6], strict=True)))
    rows = [
        None if not need else layout.zeros_in_order_of(x, x.dtype) if place is None else place.zero_()
        for x, place, need in zip(t[:3], into, needed, strict=False)
    ]
    sums = [torch.zeros_like(x, dtype=p.lse_dtype) if need else None for x, need in zip(t[3:6], needed[3:], strict=True)]
    for group in groups(p, t):
        found = of_group(group)
        for place, x, part in zip((group.queries, group.keys, group.keys), rows, found, strict=False):
            if x is not None:
                place.put(x, part)
        for x, part in zip(sums[:2], found[3:5], strict=True):
            if x is not None:
                group.add_each(x, part)
        if sums[2] is not None:
            sums[2].add_(found.sinks)
    return Gradients(*rows, *(None if g is None else g.to(x.dtype) for g, x in zip(sums, t[3:6], strict=True)))


def without_autocast(function):
    """Keep autocast, which may be on around a backend's forward or backward, from narrowing its products."""

    @functools.wraps(function)
    def wrapped(problem, *args, **kwargs):
        kind = problem.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(problem, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(problem, *args, **kwargs)

    return wrapped
