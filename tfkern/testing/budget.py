"""The error budget, which defines a correct result.

A result is correct if its error against the float64 oracle is at most twice the error of plain PyTorch in the same dtype,
plus one rounding of the result. Plain PyTorch is the naive formula and its autograd.

In float32 the factor is three. For gradients the reference error is the larger one of autograd's and of the flash backward
written out naively. A flash backward subtracts two sums that autograd never forms (with one key autograd gives an exact 0),
so no flash backward, not even PyTorch's own, keeps to the first rule. Where two computations differ only in the order of
their float32 sums, their largest errors were seen to differ by 2.4 times. Flash-attention's tests use three times as well.

In 16 bits the flash backward is written out in float32. Only O, from which it computes delta, is rounded to 16 bits, as it
is for every flash backward. With one key autograd gives an exact 0 in 16 bits as well.

Plain PyTorch's error depends on the order in which a CPU adds. It may be small by luck where there are few numbers, and 0 on
one CPU but not on another where terms cancel. So where an error exceeds that budget, plain PyTorch's error is replaced by the
largest of its own and of DRAWS runs of the same formula in float64 whose operations err as float32 may (rounding.py derives
how much). These runs are the same on every machine. Over all cases in float32, half of them err at most 1.5 times as much as
plain PyTorch did on one CPU, and nine in ten at most 2.8 times; in 16 bits 0.1 and 0.5 times.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tfkern
from tfkern import reference
from tfkern.testing.cases import Case
from tfkern.testing.inputs import GRADIENTS, Inputs, make_inputs
from tfkern.testing.rounding import Rounding

DRAWS = 8


@dataclass(frozen=True)
class Error:
    """One quantity's largest error against the oracle, the plain PyTorch error, and the budget that follows."""

    quantity: str
    error: float
    plain: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN

    def __str__(self) -> str:
        return f"{self.quantity}: error {self.error:.2e}, budget {self.budget:.2e} (plain PyTorch {self.plain:.2e})"


def results(function, inputs: Inputs, **more) -> dict[str, Tensor]:
    """out, lse and the gradients of (out . do + lse . dlse) by every differentiable argument, by any function with attention's
    arguments. Each call draws the same random bits."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        out, lse = function(**leaves, enable_gqa=True, return_lse=True, **inputs.options, **more)
    if out.numel() == 0 and not out.requires_grad:  # an oracle that went through no sequence
        out, lse = (x.requires_grad_() for x in (out, lse))
    seeds = [inputs.do.to(out.dtype), inputs.dlse.to(lse.dtype)]
    grads = torch.autograd.grad([out, lse], list(leaves.values()), seeds, allow_unused=True)
    grads = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True))
    return dict(zip(("out", "lse", *(GRADIENTS[name] for name in leaves)), (out, lse, *grads), strict=True))


def check(case: Case, dtype: torch.dtype, backend: str, device="cpu", seed: int = 0) -> list[Error]:
    """Run a case forward and backward by a backend and measure every result against its budget."""
    inputs = make_inputs(case, dtype, device, seed)
    return assess(case, inputs, results(tfkern.attention_varlen if case.lengths else tfkern.attention, inputs, backend=backend))


def assess(case: Case, inputs: Inputs, found: dict[str, Tensor]) -> list[Error]:
    """The Error of each result that was found for the inputs of a case."""
    return judge(found, truth(case, inputs), plain(case, inputs), again(case, inputs))


def again(case: Case, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
    """The flash backward's form in float64, for `judge`."""
    flash = functools.partial(reference.flash, out_dtype=inputs.tensors["query"].dtype)
    return lambda: _run(case, flash, inputs.cast(torch.float64))


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The results of the float64 oracle."""
    return _run(case, reference.attention, inputs.cast(torch.float64))


def plain(case: Case, inputs: Inputs) -> list[dict[str, Tensor]]:
    """The results of plain PyTorch: autograd's form in the inputs' dtype, and the flash backward's in float32."""
    dtype = inputs.tensors["query"].dtype
    inputs = replace(inputs.cast(dtype), options=inputs.options)  # a tensor for scale keeps its own dtype
    forms = [_run(case, reference.attention, inputs)]
    if dtype != torch.float64:
        forms.append(_run(case, functools.partial(reference.flash, out_dtype=dtype), inputs.cast(torch.float32)))
    return forms


def _run(case: Case, form: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """The results of a form of the reference, over packed sequences where the case has them."""
    return results(functools.partial(reference.attention_varlen, naive=form) if case.lengths else form, inputs)


def judge(
    found: dict, truth: dict, plains: list[dict], again: Callable[[], dict] | None = None, products: torch.dtype = torch.float32
) -> list[Error]:
    """The Error of everything found, by the rule above. `again` runs the formula in float64; `products` is the type of its
    products of matrices in the run that is judged."""
    errors = [compare(name, found[name], truth[name], [p[name] for p in plains]) for name in found]
    if again is None or all(e.ok for e in errors):
        return errors
    draws = []
    for seed in range(DRAWS):
        with Rounding(seed, products):
            draws.append(again())
    return [compare(name, found[name], truth[name], [p[name] for p in (*plains, *draws)]) for name in found]


def _factor(dtype: torch.dtype) -> float:
    """How many times plain PyTorch's error is allowed."""
    return 3.0 if dtype == torch.float32 else 2.0


def compare(quantity: str, found: Tensor, truth: Tensor, plains: list[Tensor]) -> Error:
    """The Error of `found` beside the largest of `plains`. -inf (the lse of rows that see no key) must stand where it does in
    the truth."""
    if found.shape != truth.shape or not torch.equal(found == -torch.inf, truth == -torch.inf):
        return Error(quantity, float("nan"), 0.0, 0.0)
    finite = truth != -torch.inf
    one_rounding = torch.finfo(found.dtype).eps / 2
    factor = _factor(found.dtype)
    found, truth, *plains = (x.detach().double()[finite] for x in (found, truth, *plains))
    if truth.numel() == 0:
        return Error(quantity, 0.0, 0.0, 0.0)
    error, *plain_errors = ((x - truth).abs().max().item() for x in (found, *plains))
    plain_error = max(plain_errors)
    return Error(quantity, error, plain_error, factor * plain_error + one_rounding * truth.abs().max().item())
