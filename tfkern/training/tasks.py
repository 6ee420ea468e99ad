"""What each model learns: its sizes, its batches, its loss, and the figure by which it is judged on held-out data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.bert import BERTConfig, MaskedLM
from tfkern.models.gpt import GPT, GPTConfig
from tfkern.models.vit import ViT, ViTConfig
from tfkern.training import data


@dataclass(frozen=True)
class Score:
    """A figure on held-out data: its name, its value, and how to write it."""

    name: str
    value: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.value:.1%}" if self.unit == "%" else f"{self.value:.3f}{self.unit}"


class Task(Protocol):
    """One model and what it is trained for. Everything random comes from the generator given."""

    name: str
    steps: int
    learning_rate: float

    def build(self, attention: Callable[..., Tensor]) -> nn.Module: ...

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]: ...

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor: ...

    def score(self, model: nn.Module, device: torch.device) -> Score: ...


@dataclass(frozen=True)
class LearnText:
    """GPT learns to continue English, character by character."""

    name: str = "gpt"
    steps: int = 500
    learning_rate: float = 5e-3
    rows: int = 12
    context: int = 64
    layers: int = 2
    width: int = 128

    def build(self, attention) -> GPT:
        size = GPTConfig(data.corpus().vocabulary, self.context, self.layers, 4, self.width)
        return GPT(size, attention)

    def batch(self, generator):
        corpus = data.corpus()
        return (corpus.windows(corpus.train, self.rows, self.context + 1, generator),)

    def loss(self, model, batch):
        (ids,) = batch
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def score(self, model, device):
        """Mean loss in nats per character over the first held-out stretches."""
        held_out = data.corpus().held_out
        rows = 32
        ids = held_out[: rows * self.context + 1].to(device)
        logits = model(ids[:-1].view(rows, self.context))
        return Score("held-out loss", F.cross_entropy(logits.flatten(0, 1), ids[1:]).item(), " nats/char")


@dataclass(frozen=True)
class FillIn:
    """BERT fills in masked characters. Of a share of all, 80 % become the mask and 10 % another character.

    It takes a thousand steps to find that neighbours tell: until then it guesses by frequency. The share is 30 %, twice the
    paper's: so small a model learns faster from more (Wettig et al., "Should You Mask 15% in Masked Language Modeling?", 2023).
    """

    name: str = "bert"
    steps: int = 1200
    learning_rate: float = 2e-3
    rows: int = 32
    context: int = 32
    layers: int = 2
    width: int = 64
    share: float = 0.3

    @property
    def mask_id(self) -> int:
        return data.corpus().vocabulary

    def build(self, attention) -> MaskedLM:
        size = BERTConfig(data.corpus().vocabulary + 1, self.context, 1, self.layers, 4, self.width)
        return MaskedLM(size, attention)

    def batch(self, generator):
        corpus = data.corpus()
        return self.mask(corpus.windows(corpus.train, self.rows, self.context, generator), generator)

    def mask(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(ids with holes, the true ids, where to predict)."""
        chosen = torch.rand(ids.shape, generator=generator) < self.share
        fate = torch.rand(ids.shape, generator=generator)
        others = torch.randint(self.mask_id, ids.shape, generator=generator)
        seen = torch.where(chosen & (fate < 0.8), self.mask_id, torch.where(chosen & (fate >= 0.9), others, ids))
        return seen, ids, chosen

    def loss(self, model, batch):
        seen, ids, chosen = batch
        return F.cross_entropy(model(seen)[chosen], ids[chosen])

    def score(self, model, device):
        """Share of masked held-out characters told right."""
        generator = torch.Generator().manual_seed(1)
        corpus = data.corpus()
        windows = corpus.windows(corpus.held_out, 32, self.context, generator)
        seen, ids, chosen = (x.to(device) for x in self.mask(windows, generator))
        right = model(seen)[chosen].argmax(-1) == ids[chosen]
        return Score("masked characters right", right.float().mean().item(), "%")


@dataclass(frozen=True)
class ReadDigits:
    """ViT reads handwritten digits of 8 x 8 pixels in patches of 2 x 2."""

    name: str = "vit"
    steps: int = 300
    learning_rate: float = 4e-3
    rows: int = 64
    layers: int = 2
    width: int = 48

    def build(self, attention) -> ViT:
        return ViT(ViTConfig(8, 2, 1, 10, self.layers, 4, self.width), attention)

    def batch(self, generator):
        images, labels = data.digits()[0]
        chosen = torch.randint(len(labels), (self.rows,), generator=generator)
        return images[chosen], labels[chosen]

    def loss(self, model, batch):
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def score(self, model, device):
        """Share of held-out digits read right."""
        images, labels = (x.to(device) for x in data.digits()[1])
        return Score("held-out digits right", (model(images).argmax(-1) == labels).float().mean().item(), "%")


TASKS: dict[str, Task] = {task.name: task for task in (LearnText(), FillIn(), ReadDigits())}
