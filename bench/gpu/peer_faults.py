"""Problems for which another implementation returns NaN gradients, and the results of each implementation for them.

In all of them the scores are so far below zero (lse < -88.7) that exp(-lse) overflows float32, in places of a tile that hold
no key. The known faults are:
- cuDNN's dQ with a mask and 64 keys more than a multiple of 128, PyTorch 2.11 to 2.13 (pytorch/pytorch issue 196678).
- cuDNN's dK and dV of one query and 128 keys (NVIDIA/cudnn-frontend issue 1072).
200 keys leave part of a tile empty whatever the tile size is, so other implementations, ours included, might fail there.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import tfkern
from tfkern import testing
from tfkern.backends import BACKENDS
from tfkern.bench import launches
from tfkern.bench.providers import SDPA, default_choice, is_ours, passed_over, pinned_sdpa
from tfkern.testing import budget

HEADS, HEAD_DIM = 1, 64
SCORE = -120.0  # the approximate score of every query with every key
NAMES = (*(f"tfkern {name}" for name in BACKENDS if name != "cpu"), *SDPA)


@dataclass(frozen=True)
class Fault:
    """A problem of n_q queries and n_k keys. mask: "bool" is a causal mask as a tensor, "float" a mask of zeros to add, None no
    mask."""

    name: str
    n_q: int
    n_k: int
    mask: str | None = None
    is_causal: bool = False

    def inputs(self, dtype: torch.dtype, device="cpu") -> testing.Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, size: float) -> Tensor:
            return (torch.randn(1, HEADS, rows, HEAD_DIM, generator=generator) * size).to(device, dtype)

        q, k, v, do = normal(self.n_q, 0.1), normal(self.n_k, 0.1), normal(self.n_k, 1.0), normal(self.n_q, 1.0)
        q[..., 0], k[..., 0] = 1.0, SCORE * HEAD_DIM**0.5
        tensors, dlse = dict(query=q, key=k, value=v), torch.zeros(q.shape[:3], device=device)
        options = dict(is_causal=True) if self.is_causal else {}
        if self.mask == "bool":
            options["attn_mask"] = torch.ones(self.n_q, self.n_k, dtype=torch.bool, device=device).tril()
        elif self.mask == "float":
            options["attn_mask"] = torch.zeros(self.n_q, self.n_k, dtype=dtype, device=device)
        return testing.Inputs(tensors, do, dlse, tensors, do, dlse, options)

    @property
    def case(self) -> testing.Case:
        return testing.Case(self.name, HEADS, self.n_q, HEAD_DIM, n_k=self.n_k)


FAULTS = [
    Fault("64 keys of 128, bool mask", 64, 64, "bool"),
    Fault("192 keys, bool mask", 192, 192, "bool"),
    Fault("192 keys, float mask", 192, 192, "float"),
    Fault("192 keys, causal", 192, 192, is_causal=True),
    Fault("192 keys", 192, 192),
    Fault("one query, 128 keys", 1, 128),
    Fault("200 keys, float mask", 200, 200, "float"),
    Fault("200 keys", 200, 200),
]


def cases(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    """Yield (name, function that makes its row) for every fault and provider."""
    for fault in FAULTS:
        for name in NAMES:
            yield f"{fault.name}, {name}", functools.partial(rows, fault, name, dtype, device)


def rows(fault: Fault, name: str, dtype: torch.dtype, device: torch.device) -> Iterator[dict]:
    """Yield one row: the kernels that ran, whether each result is finite, and the wrong results. These are a `problem` if the
    provider is ours, else `wrong`. If the provider cannot run, the row has the reason as `skipped`."""
    row = dict(fault=fault.name, provider=name)
    inputs = fault.inputs(dtype, device)
    try:
        with launches.watched() as seen:
            found = results(_function(name), inputs)
    except RuntimeError as error:
        yield {**row, "skipped": passed_over(name, error)}
        return
    row["kernels"] = [launches.name(one) for one in seen]
    if name == "sdpa default":
        row["kernels"] = [default_choice(*inputs.tensors.values(), **inputs.options)]
    errors = budget.assess(fault.case, inputs, found)
    wrong = "; ".join(str(e) for e in errors if not e.ok)
    row["finite"] = {quantity: bool(x.isfinite().all()) for quantity, x in found.items()}
    yield {**row, "problem" if is_ours(name) else "wrong": wrong} if wrong else row


def results(function: Callable, inputs: testing.Inputs) -> dict[str, Tensor]:
    """The output and the gradients (out, dq, dk, dv) of an attention function that returns the output alone."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    out = function(*leaves.values(), **inputs.options)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.do)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def _function(name: str) -> Callable:
    return (
        pinned_sdpa(SDPA[name]) if name in SDPA else functools.partial(tfkern.attention, backend=name.removeprefix("tfkern "))
    )
