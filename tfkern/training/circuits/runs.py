"""A training that is measured as it goes, and the trained model looked into."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import tfkern
from tfkern import reference
from tfkern.models.attention_only import AttentionOnly
from tfkern.training.circuits import heads
from tfkern.training.circuits.heads import Head
from tfkern.training.circuits.repeats import LearnRepeats, predictable, token_losses
from tfkern.training.trainer import Training

FORMED = 0.5  # a head is an induction head if at least this share of its attention, inside the repeat, matches the prefix


@dataclass(frozen=True)
class Point:
    """What is measured on held-out sequences after a number of steps; scores of heads are (layers, H)."""

    step: int
    seconds: float  # since the start, measurements included
    inside: float  # loss in the repeat, nats
    outside: float  # loss elsewhere, nats
    previous: Tensor
    prefix: Tensor
    copying: Tensor

    @property
    def induction(self) -> float:
        """The highest prefix-matching score of all heads; NaN if there are none."""
        return self.prefix.max().item() if self.prefix.numel() else float("nan")


@dataclass
class Run:
    """One model: its task, itself, and its points from before the first step to after the last."""

    task: LearnRepeats
    model: AttentionOnly
    points: list[Point] = field(default_factory=list)

    @property
    def formed(self) -> Point | None:
        """The first point at which there is an induction head."""
        return next((p for p in self.points if p.induction >= FORMED), None)

    @property
    def inducing(self) -> Head:
        """The head with the highest prefix-matching score."""
        return _highest(self.points[-1].prefix)

    @property
    def looking_back(self) -> Head:
        """The head of the first layer that looks most at the token before."""
        return _highest(self.points[-1].previous[:1])


def trained(task: LearnRepeats, seed: int = 0, points: int = 50, show: Callable[[str], None] = lambda text: None) -> Run:
    """Train with tfkern.attention, measuring before, about `points` times on the way, and after."""
    training, start = Training.start(task, tfkern.attention, seed=seed), time.perf_counter()
    run = Run(task, training.model, [measured(training.model, task, 0, 0.0)])
    every = max(1, task.steps // points)

    def on_step(training: Training) -> None:
        done = len(training.losses)
        if done % every == 0 or done == training.steps:
            run.points.append(measured(training.model, task, done, time.perf_counter() - start))
            show(f"{task.layers} layers: {done} of {training.steps}, loss in the repeat {run.points[-1].inside:.3f}")

    training.run(on_step=on_step)
    return run


@torch.no_grad()
def measured(model: AttentionOnly, task: LearnRepeats, step: int, seconds: float) -> Point:
    ids, periods = task.held_out()
    losses, inside = token_losses(model, ids), predictable(ids, periods)
    read = ids[:, :-1]
    weights = heads.patterns(model, read)
    return Point(
        step, seconds, losses[inside].mean().item(), losses[~inside].mean().item(), heads.previous_token(weights),
        heads.prefix_matching(weights, read, periods), heads.copying(model),
    )  # fmt: skip


def ideals(task: LearnRepeats) -> tuple[float, float]:
    """Losses in the repeat, in nats, of two rules on held-out sequences: predict any token seen so far, as often as it was
    seen; and predict what came after the earlier copies of the current token, which is what a perfect induction head does."""
    ids, periods = task.held_out()
    n, inside = ids.shape[1] - 1, predictable(ids, periods)
    right = ids[:, 1:, None] == ids[:, None, :-1]  # (B, N, N): the key holds what comes after the query
    seen = torch.ones(n, n).tril().bool().expand_as(right)
    shares = ((right & keys).sum(-1) / keys.sum(-1).clamp_min(1) for keys in (seen, heads.after_the_same(ids[:, :-1])))
    any_seen, looked_up = (-x[inside].log().mean().item() for x in shares)
    return any_seen, looked_up


@torch.no_grad()
def ablated(run: Run) -> Tensor:
    """(layers, H): by how many nats the loss in the repeat grows where one head writes nothing."""
    ids, periods = run.task.held_out()
    inside, c = predictable(ids, periods), run.model.config
    whole = token_losses(run.model, ids)[inside].mean()
    grown = [
        token_losses(heads.without(run.model, (layer, number)), ids)[inside].mean() - whole
        for layer in range(c.layers)
        for number in range(c.heads)
    ]
    return torch.stack(grown).view(c.layers, c.heads) if grown else torch.zeros(0, c.heads)


@torch.no_grad()
def apart(run: Run) -> float:
    """The largest difference of the model's logits from those that tfkern.reference gives in float64, on held-out sequences."""
    ids = run.task.held_out()[0][:, :-1]
    exact = run.task.build(reference.attention).double()
    exact.load_state_dict(run.model.state_dict())
    return (exact(ids) - run.model(ids)).abs().max().item()


def _highest(scores: Tensor) -> Head:
    """The layer and number of the highest of (layers, H) scores."""
    return divmod(int(scores.argmax()), scores.shape[1])
