"""The float64 oracle at the timed shape, for every head of every batch, a few at a time.

Which kernel runs, and with which tiles, depends on how much there is to do. So nothing smaller is verified in the place of what
is timed.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tfkern import testing
from tfkern.bench.shapes import Shape
from tfkern.testing import budget

SCORES = 2**27  # at a time, or one head's if it has more; autograd keeps some 60 bytes for each in float64
FEW = 2**12  # queries; with more, plain PyTorch's error is not small by luck, which budget.judge checks
SEED = 0


@dataclass(frozen=True)
class Part:
    """Some heads, their results in float64, and plain PyTorch's."""

    batches: slice
    heads: slice
    case: testing.Case
    inputs: testing.Inputs
    truth: dict[str, Tensor]
    plains: list[dict[str, Tensor]]

    def judge(self, found: dict[str, Tensor]) -> list[testing.Error]:
        found = {name: x[self.batches, self.heads] for name, x in found.items()}
        again = budget.again(self.case, self.inputs) if self.inputs.dlse.numel() <= FEW else None
        return testing.judge(found, self.truth, self.plains, again)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The timed q, k, v and do, the same in every run."""
    return shape.inputs(dtype, device, torch.Generator(device).manual_seed(SEED))


@functools.lru_cache(maxsize=1)  # the providers of a shape come one after the other
def oracle(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Part]:
    """The float64 results for `inputs`."""
    tensors = inputs(shape, dtype, device)
    found = [_part(shape, *at, *(x.detach()[at] for x in tensors)) for at in parts(shape)]
    if device.type == "cuda":
        torch.cuda.synchronize()  # whatever stream they are used on
    return found


def parts(shape: Shape) -> Iterator[tuple[slice, slice]]:
    """(batches, heads), together all of them, each with no more than SCORES if it is more than one head."""
    heads = max(1, min(shape.heads, SCORES // shape.length**2))
    batches = max(1, SCORES // (heads * shape.length**2)) if heads == shape.heads else 1
    for b in range(0, shape.batch, batches):
        for h in range(0, shape.heads, heads):
            yield slice(b, b + batches), slice(h, h + heads)


def _part(shape: Shape, batches: slice, heads: slice, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Part:
    tensors, dlse = dict(query=q, key=k, value=v), torch.zeros(q.shape[:3], device=q.device)
    given = testing.Inputs(tensors, do, dlse, tensors, do, dlse, dict(is_causal=shape.is_causal))
    case = testing.Case(shape.name, shape.heads, shape.length, shape.head_dim)
    truth, *plains = (
        {name: x.detach() for name, x in form.items() if name != "lse"}  # which no provider gives
        for form in (testing.truth(case, given), *testing.plain(case, given))
    )
    return Part(batches, heads, case, given, truth, plains)


def worst(found: dict[str, Tensor], right: list[Part]) -> list[testing.Error]:
    """Of each quantity the Error of the part where it is largest beside its budget."""
    errors = [error for part in right for error in part.judge(found)]
    return [max((e for e in errors if e.quantity == name), key=_excess) for name in found]


def _excess(e: testing.Error) -> float:
    """How many times the budget an error is; infinite where it is NaN."""
    if e.ok:
        return e.error / e.budget if e.budget else 0.0
    return e.error / e.budget if e.budget and e.error == e.error else float("inf")
