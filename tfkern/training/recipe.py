"""How a model is trained, whatever the model is: steps, batches, learning rate, precision."""

import dataclasses
import math
from dataclasses import dataclass

from tfkern.ending import InputError

AMP = ("none", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """The settings of AdamW and of a step. A checkpoint keeps them, because what comes next depends on each of them."""

    steps: int
    rows: int  # examples of one update, all processes and accumulated parts together
    learning_rate: float  # at its peak
    warmup: int | None = None  # steps of linear rise; None is a tenth of all
    weight_decay: float = 0.01  # of weights and embeddings, not of biases and norms
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # the largest norm of all gradients together
    accumulate: int = 1  # parts of a batch that run one after the other
    amp: str = "none"  # the dtype of autocast; "fp16" also scales the loss
    compile: bool = False
    mask_share: float = 0.15  # bert's pre-training alone: the share of tokens to be told

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * schedule(step, self.steps, self.warmup)

    def changed(self, **settings) -> "Recipe":
        """With the settings that are not None in place of its own."""
        return dataclasses.replace(self, **{k: v for k, v in settings.items() if v is not None})

    def check(self, processes: int = 1) -> None:
        """InputError where rows can't be dealt out evenly."""
        if self.rows % (self.accumulate * processes):
            among = f"--accumulate, {self.accumulate}" + (f", times {processes} processes" if processes > 1 else "")
            raise InputError(f"--rows must be a multiple of {among}, but is {self.rows}")


def schedule(step: int, steps: int, warmup: int | None = None) -> float:
    """The share of the learning rate at a step: up over the warm-up, then a half cosine down to a tenth."""
    warm = max(1, steps // 10 if warmup is None else warmup)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
