"""The lengths of sequences, packed or in a batch, and an order by length.

Lengths are read, for which a GPU's stream is waited for.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern.problem import Problem, Tensors

FEW = 1 << 16  # elements that are copied in the time that a call takes on a CPU, beside what it computes


class Places(NamedTuple):
    """Of each sequence, where its queries and keys start in packed memory, and how many there are of each; neighbours of equal
    lengths that lie side by side; and whether all queries, and all keys, belong to a sequence."""

    starts: list[tuple[int, int]] | None
    sizes: list[tuple[int, int]]
    runs: list[slice]
    all_queries: bool = True
    all_keys: bool = True


def places_of(p: Problem, t: Tensors) -> Places:
    """Whatever the values are that nobody checked, these are within the tensors."""
    if p.has_key_lengths:
        sizes = [(p.n_q, n) for n in t.key_lengths.clamp(0, p.n_k).tolist()]
        return Places(None, sizes, _runs(sizes), all_keys=False)
    cu_q, cu_k = (x.clamp(0, n).cummax(0).values.tolist() for x, n in ((t.cu_q, p.n_q), (t.cu_k, p.n_k)))
    starts = list(zip(cu_q, cu_k, strict=True))
    sizes = [(q1 - q0, k1 - k0) for (q0, k0), (q1, k1) in itertools.pairwise(starts)]
    all_of = (cu[0] == 0 and cu[-1] == n for cu, n in ((cu_q, p.n_q), (cu_k, p.n_k)))
    return Places(starts, sizes, _runs(sizes), *all_of)


def _runs(sizes: list[tuple[int, int]]) -> list[slice]:
    """Neighbours of equal lengths."""
    cuts = [0, *(b for b, (x, y) in enumerate(itertools.pairwise(sizes), 1) if x != y), len(sizes)]
    return [slice(*pair) for pair in itertools.pairwise(cuts)] if sizes else []


class Order(NamedTuple):
    """Another order of the sequences: their numbers; and if packed the rows of queries and of keys, and cu_q and cu_k, in this
    order."""

    numbers: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    ends: tuple[Tensor, Tensor] | None = None

    def tensors(self, t: Tensors) -> Tensors:
        """Those in this order."""
        q, k, v = _taken(t.q, self.numbers, self.queries), *(_taken(x, self.numbers, self.keys) for x in (t.k, t.v))
        each = {name: self.of_each(getattr(t, name)) for name in ("bias", "mask", "slopes", "key_lengths")}
        cu_q, cu_k = self.ends or (None, None)
        return t._replace(q=q, k=k, v=v, **each, cu_q=cu_q, cu_k=cu_k)

    def of_each(self, x: Tensor | None) -> Tensor | None:
        """What has one entry for each sequence, or one for all."""
        return x if x is None or len(x) == 1 else x[self.numbers]

    def of(self, x: Tensor | None) -> Tensor | None:
        """What has rows of queries."""
        return None if x is None else _taken(x, self.numbers, self.queries)

    def back(self, x: Tensor | None, keys: bool = False) -> Tensor | None:
        """What is in this order, as it was before; it has rows of queries, or of keys."""
        rows = self.keys if keys else self.queries
        return None if x is None else _taken(x, self.numbers.argsort(), rows if rows is None else rows.argsort())


def _taken(x: Tensor, numbers: Tensor, rows: Tensor | None) -> Tensor:
    """Those sequences of (B, H, …), or of (1, H, total, …) those rows. Whole rows are copied at once where heads lie within."""
    if rows is None:
        return x.index_select(0, numbers)
    return x[0].transpose(0, 1).index_select(0, rows).transpose(0, 1)[None]


def order_of(p: Problem, t: Tensors, places: Places) -> Order | None:
    """The order by lengths, where the calls that it saves cost more than its copies."""
    starts, sizes, runs, *_ = places
    if not (places.all_queries and (places.all_keys or not p.packed)):
        return None
    copied = sum(x.numel() for x in (t.q, t.k, t.v, t.v))
    if copied >= FEW * (len(runs) - len(set(sizes))):
        return None
    numbers = sorted(range(len(sizes)), key=sizes.__getitem__)
    tensor = torch.tensor(numbers, device=p.device)
    if not p.packed:
        return Order(tensor)
    firsts, counts = (torch.tensor([x[b] for b in numbers], device=p.device).unbind(1) for x in (starts, sizes))
    ends = tuple(torch.cat([n.new_zeros(1), n.cumsum(0)]) for n in counts)
    rows = (  # start, start + 1, … of each, behind each other
        torch.arange(total, device=p.device) + (first - end[:-1]).repeat_interleave(count, output_size=total)
        for first, count, end, total in zip(firsts, counts, ends, (p.n_q, p.n_k), strict=True)
    )
    return Order(tensor, *rows, ends)
