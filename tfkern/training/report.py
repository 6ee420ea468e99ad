"""The demo's report: the table of its trainings, their figures as JSON, and samples of text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tfkern.training import provenance, sampling
from tfkern.training.tasks import Score
from tfkern.training.trainer import Training

NAIVE = "naive"  # the name that tfkern.reference has beside those of backends


@dataclass(frozen=True)
class Run:
    """A training, the backend that computed its attention, and what came of it."""

    backend: str
    training: Training
    score: Score
    launches: dict[str, int]  # of Triton kernels while it trained, by name

    @property
    def by(self) -> str:
        """The backend, and where it ran."""
        return provenance.label(self.backend, self.training.device)


@dataclass(frozen=True)
class Comparison:
    """One task trained from the same seed by several backends, by the naive formula first."""

    name: str
    runs: list[Run]
    bound: float  # nats that the loss curves may be apart

    @property
    def losses(self) -> Tensor:
        """(runs, steps), in nats."""
        return torch.tensor([run.training.losses for run in self.runs], dtype=torch.float64)

    @property
    def apart(self) -> float:
        """The largest distance between any two of the loss curves, in nats; NaN if a loss is."""
        return (self.losses.amax(0) - self.losses.amin(0)).max().item()

    @property
    def from_naive(self) -> Tensor:
        """(runs - 1, steps): how far the loss of each other run is from the naive run's, in nats."""
        return (self.losses[1:] - self.losses[0]).abs()

    @property
    def shown(self) -> Run:
        """The run whose model the report shows at work: the first that isn't naive."""
        return self.runs[1]


HEADINGS = ("model", "attention by", "parameters", "steps", "last loss", "held out", "kernels launched", "most from naive")


def summary(comparisons: dict[str, Comparison]) -> list[tuple[str, ...]]:
    """A row a run, under HEADINGS. Losses in nats."""
    rows = []
    for c in comparisons.values():
        distances = ["", *(f"{x:.1e}" for x in c.from_naive.amax(-1))]
        for run, distance in zip(c.runs, distances, strict=True):
            t = run.training
            parameters, launched = sum(x.numel() for x in t.model.parameters()), sum(run.launches.values())
            rows.append((
                c.name, run.by, f"{parameters:,}", str(t.steps), f"{t.losses[-1]:.3f}", f"{run.score.name} {run.score}",
                f"{launched:,}", distance,
            ))  # fmt: skip
    return rows


def figures(comparisons: dict[str, Comparison], computed_by: str, problems: list[str]) -> dict:
    """Every loss and score, for JSON."""
    models = {
        c.name: dict(
            steps=c.runs[0].training.steps, apart=c.apart, bound=c.bound,
            runs={
                run.by: {"losses": run.training.losses, run.score.name: run.score.value, "launches": run.launches}
                for run in c.runs
            },
        )
        for c in comparisons.values()
    }  # fmt: skip
    return dict(computed_by=computed_by, problems=problems, models=models)


def samples(gpt: Run, bert: Run, seed: int) -> str:
    """What the trained GPT writes, how the trained BERT fills in what is missing, and who computed it."""
    computed_by = provenance.computed_by([gpt.backend, bert.backend], gpt.training.device, seed)
    written = sampling.continued(gpt.training, "The ", 300, temperature=0.7)
    return f"{computed_by}\n\nGPT writes:\n{written}\n\n{sampling.filled(bert.training)}\n"
