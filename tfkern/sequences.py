"""The lengths of sequences, packed or in a batch, on the host, and an order by length. (kernels/sequence.py reads them on the
device.)

Reading lengths waits for a GPU's stream.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern.problem import Problem, Tensors

FEW = 1 << 16  # elements: copying them takes as long as the overhead of one call on a CPU


class Places(NamedTuple):
    """starts and sizes: (queries, keys) of each sequence, where they start in packed memory and how many there are. runs:
    neighbouring sequences of equal lengths. all_queries, all_keys: whether every row belongs to a sequence."""

    starts: list[tuple[int, int]] | None
    sizes: list[tuple[int, int]]
    runs: list[slice]
    all_queries: bool = True
    all_keys: bool = True


def places_of(p: Problem, t: Tensors) -> Places:
    """The places of a problem's sequences, clamped to lie within the tensors: on a GPU nobody has checked the values."""
    if p.has_key_lengths:
        sizes = [(p.n_q, n) for n in t.key_lengths.clamp(0, p.n_k).tolist()]
        return Places(None, sizes, _runs(sizes), all_keys=False)
    cu_q, cu_k = (x.clamp(0, n).cummax(0).values.tolist() for x, n in ((t.cu_q, p.n_q), (t.cu_k, p.n_k)))
    starts = list(zip(cu_q, cu_k, strict=True))
    sizes = [(q1 - q0, k1 - k0) for (q0, k0), (q1, k1) in itertools.pairwise(starts)]
    all_of = (cu[0] == 0 and cu[-1] == n for cu, n in ((cu_q, p.n_q), (cu_k, p.n_k)))
    return Places(starts, sizes, _runs(sizes), *all_of)


def _runs(sizes: list[tuple[int, int]]) -> list[slice]:
    """Slices of neighbouring sequences that have equal lengths."""
    cuts = [0, *(b for b, (x, y) in enumerate(itertools.pairwise(sizes), 1) if x != y), len(sizes)]
    return [slice(*pair) for pair in itertools.pairwise(cuts)] if sizes else []


class Order(NamedTuple):
    """Another order as indices for index_select: of the sequences, and if packed of the rows of queries and of keys."""

    sequences: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None

    def tensors(self, t: Tensors) -> Tensors:
        """The tensors in this order, without lengths."""
        each = {name: self.of_each(getattr(t, name)) for name in ("bias", "mask", "slopes")}
        rows = dict(q=self.of(t.q), k=self.of_keys(t.k), v=self.of_keys(t.v))
        return t._replace(**rows, **each, key_lengths=None, cu_q=None, cu_k=None)

    def of_each(self, x: Tensor | None) -> Tensor | None:
        """A tensor with one entry for each sequence, or one for all, in this order."""
        return x if x is None or len(x) == 1 else x[self.sequences]

    def of(self, x: Tensor | None) -> Tensor | None:
        """A tensor with rows of queries in this order."""
        return None if x is None else _taken(x, self.sequences, self.queries)

    def of_keys(self, x: Tensor | None) -> Tensor | None:
        """A tensor with rows of keys in this order."""
        return None if x is None else _taken(x, self.sequences, self.keys)

    def back(self) -> "Order":
        """The inverse order."""
        return Order(*(None if x is None else x.argsort() for x in self))


def _taken(x: Tensor, sequences: Tensor, rows: Tensor | None) -> Tensor:
    """The given sequences of (B, H, …), or the given rows of (1, H, total, …). Where heads lie within rows, whole rows are
    copied at once."""
    if rows is None:
        return x.index_select(0, sequences)
    return x[0].transpose(0, 1).index_select(0, rows).transpose(0, 1)[None]


def order_of(p: Problem, t: Tensors, places: Places) -> tuple[Order, Places, list[int]] | None:
    """(the order by length, the places in it, the numbers of the sequences in it); None where the copies cost more than the
    calls that the order saves."""
    starts, sizes, runs, *all_of = places
    if not (places.all_queries and (places.all_keys or not p.packed)):
        return None
    copied = sum(x.numel() for x in (t.q, t.k, t.v, t.v))
    if copied >= FEW * (len(runs) - len(set(sizes))):
        return None
    numbers = sorted(range(len(sizes)), key=sizes.__getitem__)
    sequences, sizes = torch.tensor(numbers, device=p.device), [sizes[b] for b in numbers]
    if not p.packed:
        return Order(sequences), Places(None, sizes, _runs(sizes), *all_of), numbers
    ends = [[0, *itertools.accumulate(n)] for n in zip(*sizes, strict=True)]
    rows = []
    for i, total in enumerate((p.n_q, p.n_k)):  # start, start + 1, … of each sequence, one after another
        first, count = (torch.tensor(x, device=p.device) for x in ([starts[b][i] for b in numbers], [n[i] for n in sizes]))
        moved = first - torch.tensor(ends[i][:-1], device=p.device)
        rows.append(torch.arange(total, device=p.device) + moved.repeat_interleave(count, output_size=total))
    return Order(sequences, *rows), Places(list(zip(*ends, strict=True)), sizes, _runs(sizes), *all_of), numbers
