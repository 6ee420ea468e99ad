"""What a model learns: its batches, its loss, and the figure by which it is judged on held-out data.

Here are those of texts; tfkern/training/classifying.py has those with classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.bert import BERTConfig, MaskedLM
from tfkern.models.gpt import GPT, GPTConfig
from tfkern.models.tokens import Characters
from tfkern.training import data, kinds
from tfkern.training.recipe import Recipe


@dataclass(frozen=True)
class Score:
    """A figure on held-out data: its name, its value, and how to write it."""

    name: str
    value: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.value:.1%}" if self.unit == "%" else f"{self.value:.3f}{self.unit}"


class Task:
    """One model and what it is trained for. Everything random comes from the generator given."""

    name: str
    kind: str  # of its model, by the names in tfkern/training/kinds.py
    recipe: Recipe

    @property
    def steps(self) -> int:
        return self.recipe.steps

    def build(self, attention: Callable[..., Tensor]) -> nn.Module:
        """A fresh model; its weights follow from PyTorch's default generator."""
        raise NotImplementedError

    def batch(self, generator: torch.Generator, rows: int | None = None) -> tuple[Tensor, ...]:
        """Tensors whose first dim is `rows`, the recipe's by default. Every process draws the whole batch and trains on a part
        of its rows."""
        raise NotImplementedError

    def load(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the loss reads, of some rows of a batch that may only name it."""
        return batch

    def weight(self, batch: tuple[Tensor, ...]) -> int:
        """Of how many things the loss is the mean."""
        return len(batch[0])

    def tokens(self, batch: tuple[Tensor, ...]) -> int:
        """How many tokens the model reads."""
        return batch[0].numel()

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss of what `load` gave."""
        raise NotImplementedError

    def score(self, model: nn.Module, device: torch.device) -> Score:
        """How good it is on held-out data."""
        raise NotImplementedError


@dataclass(frozen=True)
class LearnText(Task):
    """GPT learns to continue a text."""

    config: GPTConfig
    recipe: Recipe
    corpus: data.Corpus | None = None  # None is the built-in text
    name: str = "gpt"
    kind = "gpt"

    @property
    def data(self) -> data.Corpus:
        return self.corpus or data.corpus()

    @property
    def model_config(self) -> GPTConfig:
        return replace(self.config, vocab_size=self.data.tokenizer.size)

    def build(self, attention) -> GPT:
        return kinds.build(self.kind, self.model_config, attention)

    def batch(self, generator, rows=None):
        return (self.data.windows(self.data.train, rows or self.recipe.rows, self.config.context + 1, generator),)

    def tokens(self, batch):
        return batch[0].shape[0] * self.config.context

    def loss(self, model, batch):
        (ids,) = batch
        return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())

    def score(self, model, device):
        """Mean loss in nats per token over the first held-out stretches."""
        held_out, context = self.data.held_out, self.config.context
        rows = min(32, (len(held_out) - 1) // context)
        ids = held_out[: rows * context + 1].to(device)
        logits = model(ids[:-1].view(rows, context)).float()
        unit = "char" if isinstance(self.data.tokenizer, Characters) else "token"
        return Score("held-out loss", F.cross_entropy(logits.flatten(0, 1), ids[1:]).item(), f" nats/{unit}")


@dataclass(frozen=True)
class FillIn(Task):
    """BERT fills in masked tokens. Of a share of all, 80 % become the mask and 10 % another token.

    A small one takes a thousand steps to find that neighbours tell: until then it guesses by frequency.
    """

    config: BERTConfig
    recipe: Recipe
    corpus: data.Corpus | None = None  # None is the built-in text
    name: str = "bert"
    kind = "bert"

    @property
    def data(self) -> data.Corpus:
        return self.corpus or data.corpus(("mask",))

    @property
    def model_config(self) -> BERTConfig:
        return replace(self.config, vocab_size=self.data.tokenizer.size)

    @property
    def mask_id(self) -> int:
        return self.data.tokenizer.special("mask")

    @property
    def framed(self) -> tuple[list[int], list[int]]:
        """The tokens that begin and end a row, such as [CLS] and [SEP], where the tokenizer has them."""
        found = (self.data.tokenizer.special(name) for name in ("cls", "sep"))
        before, after = ([] if token is None else [token] for token in found)
        return before, after

    def build(self, attention) -> MaskedLM:
        return kinds.build(self.kind, self.model_config, attention)

    def batch(self, generator, rows=None):
        return self.mask(self.rows(self.data.train, rows or self.recipe.rows, generator), generator)

    def rows(self, part: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(count, context) ids: stretches of a part, in their frames."""
        before, after = self.framed
        windows = self.data.windows(part, count, self.config.context - len(before) - len(after), generator)
        frames = (torch.tensor(tokens, dtype=torch.int64).expand(count, -1) for tokens in (before, after))
        return torch.cat([next(frames), windows, next(frames)], 1)

    def mask(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(ids with holes, the true ids, where to predict)."""
        tokenizer, (before, after) = self.data.tokenizer, self.framed
        kinds_of_tokens = len(tokenizer.characters) if isinstance(tokenizer, Characters) else tokenizer.size
        chosen = torch.rand(ids.shape, generator=generator) < self.recipe.mask_share
        chosen[:, : len(before)] = False
        chosen[:, ids.shape[1] - len(after) :] = False
        fate = torch.rand(ids.shape, generator=generator)
        others = torch.randint(kinds_of_tokens, ids.shape, generator=generator)
        seen = torch.where(chosen & (fate < 0.8), self.mask_id, torch.where(chosen & (fate >= 0.9), others, ids))
        return seen, ids, chosen

    def weight(self, batch):
        return int(batch[2].sum())

    def loss(self, model, batch):
        seen, ids, chosen = batch
        told = F.cross_entropy(model(seen)[chosen].float(), ids[chosen], reduction="sum")
        return told / chosen.sum().clamp_min(1)

    def score(self, model, device):
        """Share of masked held-out tokens told right."""
        generator = torch.Generator().manual_seed(1)
        rows = self.rows(self.data.held_out, 32, generator)
        seen, ids, chosen = (x.to(device) for x in self.mask(rows, generator))
        right = model(seen)[chosen].argmax(-1) == ids[chosen]
        unit = "characters" if isinstance(self.data.tokenizer, Characters) else "tokens"
        return Score(f"masked {unit} right", right.float().mean().item(), "%")
