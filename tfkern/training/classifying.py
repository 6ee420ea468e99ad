"""Tasks with classes: ViT and Mixer tell what is in an image, BERT tells what a sentence is."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.bert import BERTConfig, Classifier
from tfkern.models.mixer import MixerConfig
from tfkern.models.tokens import Tokenizer
from tfkern.models.vit import ViTConfig
from tfkern.training import data, kinds
from tfkern.training.recipe import Recipe
from tfkern.training.tasks import Score, Task

HELD_OUT_ROWS = 256  # of one forward when the score is taken


@dataclass(frozen=True)
class ReadImages(Task):
    """ViT or Mixer tells the class of an image."""

    config: ViTConfig | MixerConfig
    recipe: Recipe
    pictures: data.Pictures | None = None  # None is the built-in digits
    kind: str = "vit"

    @property
    def name(self) -> str:
        return self.kind

    @property
    def data(self) -> data.Pictures:
        return self.pictures or data.digit_pictures(self.config.image, self.config.channels)

    @property
    def model_config(self) -> ViTConfig | MixerConfig:
        return replace(self.config, classes=len(self.data.classes))

    def build(self, attention) -> nn.Module:
        return kinds.build(self.kind, self.model_config, attention)

    def batch(self, generator, rows=None):
        return _drawn(self.data.train, rows or self.recipe.rows, generator)

    def load(self, batch):
        return self.data.read(batch[0]), self.data.labels[batch[0]]

    def tokens(self, batch):
        """Patches, and ViT's class token."""
        return len(batch[0]) * ((self.config.image // self.config.patch) ** 2 + (self.kind == "vit"))

    def loss(self, model, batch):
        images, labels = batch
        return F.cross_entropy(model(images).float(), labels)

    def score(self, model, device):
        """Share of held-out images read right."""
        what = "images" if self.pictures else "digits"
        return _right(f"held-out {what} right", self, model, device)


@dataclass(frozen=True)
class JudgeSentences(Task):
    """BERT with a classification head is fine-tuned on labelled sentences."""

    config: BERTConfig
    recipe: Recipe
    sentences: data.Sentences
    name: str = "bert-classifier"
    kind = "bert-classifier"

    @property
    def data(self) -> data.Sentences:
        return self.sentences

    @property
    def cut(self) -> int:
        """How many sentences are longer than the context, and lose their ends."""
        longest = 2 + max(map(len, self.data.ids))
        return int((padded(self.data.ids, self.data.tokenizer, longest)[1] > self.config.context).sum())

    @property
    def model_config(self) -> BERTConfig:
        return replace(self.config, vocab_size=self.data.tokenizer.size, classes=len(self.data.classes))

    def build(self, attention) -> Classifier:
        return kinds.build(self.kind, self.model_config, attention)

    def batch(self, generator, rows=None):
        return _drawn(self.data.train, rows or self.recipe.rows, generator)

    def load(self, batch):
        ids = [self.data.ids[i] for i in batch[0].tolist()]
        return *padded(ids, self.data.tokenizer, self.config.context), self.data.labels[batch[0]]

    def tokens(self, batch):
        return int(self.load(batch)[1].sum())

    def loss(self, model, batch):
        ids, lengths, labels = batch
        return F.cross_entropy(model(ids, lengths).float(), labels)

    def score(self, model, device):
        """Share of held-out sentences told right."""
        return _right("held-out sentences right", self, model, device)


def padded(sentences: list[list[int]], tokenizer: Tokenizer, context: int) -> tuple[Tensor, Tensor]:
    """(ids (B, N), lengths (B,)) as the classifier reads sentences.

    The class is read off the first token, which is [CLS], or the mask where a tokenizer has no [CLS]. [SEP] ends a sentence
    where there is one. What goes beyond the context is cut off.
    """
    first = tokenizer.special("cls")
    first = tokenizer.special("mask") if first is None else first
    sep = tokenizer.special("sep")
    after = [] if sep is None else [sep]
    rows = [torch.tensor([first, *ids[: context - 1 - len(after)], *after]) for ids in sentences]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.special("pad") or 0), lengths


def _drawn(indices: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor]:
    """`rows` of the indices, at random with replacement."""
    return (indices[torch.randint(len(indices), (rows,), generator=generator)],)


def _right(name: str, task: ReadImages | JudgeSentences, model, device: torch.device) -> Score:
    """The share of held-out examples whose likeliest class is the right one."""
    right = 0
    for indices in task.data.held_out.split(HELD_OUT_ROWS):
        *given, labels = (x.to(device) for x in task.load((indices,)))
        right += int((model(*given).argmax(-1) == labels).sum())
    return Score(name, right / len(task.data.held_out), "%")
