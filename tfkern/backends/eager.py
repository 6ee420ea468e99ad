"""Attention by PyTorch operations, on any device, in O(N) memory.

Packed sequences and batches with key lengths are taken as dense groups (groups.py), for which their lengths are read: on a GPU
this backend, unlike the kernels, waits for the stream there. Queries go in tiles past all of the keys that they see
(eager_tiles.py), in float32 (float64 for float64). A tile has all keys of its queries, so that the backward makes weights as
the forward did, and needs nothing of the stats; m is 0 here.
"""

from torch import Tensor

from tfkern import groups
from tfkern.eager_groups import backward_group, forward_group
from tfkern.groups import Group
from tfkern.problem import Gradients, Problem, Tensors


def unsupported(problem: Problem, needs_grad: bool) -> list[str]:
    """The reasons why it can't do the problem: none."""
    return []


@groups.without_autocast
def forward(problem: Problem, t: Tensors) -> tuple[Tensor, Tensor]:
    """out in q's memory order, stats (B, H, stats_rows, Nq) float32, or float64 for float64; B is 1 for packed sequences."""
    return groups.results(problem, t, forward_group)


@groups.without_autocast
def backward(problem: Problem, t: Tensors, out, stats, do, dlse, needed, into=None) -> Gradients:
    """The needed gradients, those of q, k and v in the memory order of what they are the gradients of, or written into the
    three tensors given."""

    def of_group(group: Group, do: Tensor, dlse: Tensor | None) -> Gradients:
        return backward_group(group, do, dlse, needed)

    return groups.gradients(problem, t, needed, into, of_group, do, dlse)
