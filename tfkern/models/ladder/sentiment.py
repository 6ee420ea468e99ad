"""A classifier of sentences around any rung: embeddings, the rung, and a linear readout of each token, averaged.

Readout and average are linear, so the logit is the sum of what the tokens contribute: the pictures show these. There are no
positions: in sentences this short the words tell, whatever their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.ladder import sentences

WEIGHT_DECAY = 1.0


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(ids (B, N) int64, padded with 0, lengths (B,) int64) of sentences made of the words of ours; ValueError otherwise."""
    words = [text.split() for text in texts]
    if unknown := sorted({w for row in words for w in row} - set(sentences.WORDS)):
        raise ValueError(f"texts must be made of the words of tfkern.models.ladder.sentences, but have {unknown}; replace them")
    lengths = torch.tensor([len(row) for row in words])
    if not len(lengths) or not lengths.all():
        raise ValueError(f"texts must be sentences of one word or more, but have {lengths.tolist()} words; leave out the empty")
    ids = torch.zeros(len(words), int(lengths.max()), dtype=torch.int64)
    for row, known in zip(ids, words, strict=True):
        row[: len(known)] = torch.tensor([sentences.WORDS.index(w) for w in known])
    return ids, lengths


class Sentiment(nn.Module):
    """Sentences to logits: positive is good. `layer` maps (x (B, N, width), key_lengths (B,)) to (B, N, out or width)."""

    def __init__(self, layer: nn.Module, width: int, out: int | None = None):
        super().__init__()
        self.words = nn.Embedding(len(sentences.WORDS), width)
        self.layer = layer
        self.readout = nn.Linear(width if out is None else out, 1, bias=False)
        nn.init.normal_(self.words.weight, std=0.1)  # small: what a word is comes from the sentences, not from the draw

    def contributions(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, N): what each token adds to the logit; 0 for padding."""
        each = self.readout(self.layer(self.words(ids), lengths))[..., 0]  # (B, N)
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        return torch.where(real, each, 0.0) / lengths[:, None]

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids (B, N), lengths (B,) as encode gives them -> logits (B,)."""
        return self.contributions(ids, lengths).sum(-1)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """Logits (B,) of sentences, without dropout."""
        return self.eval()(*encode(texts))


@dataclass(frozen=True)
class Fit:
    """The loss in nats and the share of sentences classified correctly, for training and held-out sentences, and the held-out
    logits."""

    loss: float
    right: float
    held_out_loss: float
    held_out_right: float
    held_out_logits: Tensor


def judged(logits: Tensor, truth: Sequence[float]) -> tuple[float, float]:
    """(cross-entropy in nats, share right) of logits (B,)."""
    wanted = torch.tensor(truth)
    return F.binary_cross_entropy_with_logits(logits, wanted).item(), ((logits > 0) == (wanted > 0)).float().mean().item()


def train(model: Sentiment, steps: int = 100, learning_rate: float = 1e-2, weight_decay: float = WEIGHT_DECAY) -> Fit:
    """Train on all sentences at once by AdamW, and judge. The model is left as in evaluation, without dropout."""
    (texts, truth), (held_out, held_out_truth) = sentences.TRAIN, sentences.HELD_OUT
    (ids, lengths), wanted = encode(texts), torch.tensor(truth)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(ids, lengths), wanted).backward()
        optimizer.step()
    logits = model.logits(held_out)
    return Fit(*judged(model.logits(texts), truth), *judged(logits, held_out_truth), logits)
