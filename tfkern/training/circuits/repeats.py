"""The task: a sequence of random tokens that begins anew after a random number of them, again and again.

Olsson et al., "In-context Learning and Induction Heads" (2022). Inside the repeat the next token is the one that came after the
current token before. Each sequence has a period of its own, so positions don't tell where that was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tfkern.models.attention_only import AttentionOnly, AttentionOnlyConfig
from tfkern.training.recipe import Recipe
from tfkern.training.tasks import Score, Task


@dataclass(frozen=True)
class LearnRepeats(Task):
    """An attention-only transformer reads `context` tokens and predicts each next one; periods go from shortest to longest."""

    name: str = "repeats"
    steps: int = 1500
    learning_rate: float = 0.01
    rows: int = 16
    layers: int = 2
    vocab_size: int = 64
    context: int = 48
    heads: int = 4
    width: int = 64
    shortest: int = 8
    longest: int = 24

    def __post_init__(self):
        if not 1 <= self.shortest <= self.longest < self.context:
            raise ValueError(
                f"shortest and longest must go up from 1 and stay below context, {self.context}, "
                f"but they are {self.shortest} and {self.longest}"
            )

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.steps, self.rows, self.learning_rate)

    def build(self, attention: Callable[..., Tensor]) -> AttentionOnly:
        size = AttentionOnlyConfig(self.vocab_size, self.context, self.layers, self.heads, self.width)
        return AttentionOnly(size, attention)

    def batch(self, generator: torch.Generator, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """(ids (rows, context + 1), periods (rows,)): ids[t] = ids[t - period], the first `period` of them independent."""
        rows = rows or self.rows
        periods = torch.randint(self.shortest, self.longest + 1, (rows,), generator=generator)
        block = torch.randint(self.vocab_size, (rows, self.longest), generator=generator)
        return block.gather(1, torch.arange(self.context + 1) % periods[:, None]), periods

    def loss(self, model: AttentionOnly, batch: tuple[Tensor, Tensor]) -> Tensor:
        return token_losses(model, batch[0]).mean()

    def score(self, model: AttentionOnly, device: torch.device) -> Score:
        """Mean loss inside the repeat of held-out sequences."""
        ids, periods = (x.to(device) for x in self.held_out())
        return Score("loss in the repeat", token_losses(model, ids)[predictable(ids, periods)].mean().item(), " nats")

    def held_out(self, rows: int = 128) -> tuple[Tensor, Tensor]:
        """A batch for measuring, the same each time. No training draws them: their generator's seed is negative."""
        return self.batch(torch.Generator().manual_seed(-1), rows)


def token_losses(model: AttentionOnly, ids: Tensor) -> Tensor:
    """ids (B, N + 1) -> (B, N) cross-entropies in nats: entry t is that of token t + 1, given those up to t."""
    return F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")


def in_repeat(ids: Tensor, periods: Tensor) -> Tensor:
    """(B, N) bool: True where the token has been seen a period before."""
    return torch.arange(ids.shape[1], device=ids.device) >= periods[:, None]


def predictable(ids: Tensor, periods: Tensor) -> Tensor:
    """ids (B, N + 1) -> (B, N) bool, True where token t + 1 is inside the repeat: a period before, it came after
    token t."""
    return in_repeat(ids[:, :-1], periods)
