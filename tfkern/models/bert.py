"""BERT. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019).

An encoder of post-norm blocks with learned positions and segments, exact GELU, a tanh pooler over the first token, and a
masked-language-model head tied to the token embedding.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.functional import attention as fused_attention
from tfkern.nn import SelfAttention


@dataclass(frozen=True)
class BERTConfig:
    """Sizes; the defaults are BERT-base's, 109,482,240 parameters with the pooler."""

    vocab_size: int = 30522
    context: int = 512
    segments: int = 2
    layers: int = 12
    heads: int = 12
    width: int = 768
    hidden: int | None = None  # width of the MLP's middle; None is 4 * width
    classes: int = 2  # of the classification head
    dropout: float = 0.0  # after the embeddings and each residual branch; the original trains with 0.1
    eps: float = 1e-12


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, c: BERTConfig, attention: Callable[..., Tensor]):
        super().__init__()
        self.attn = SelfAttention(c.width, c.heads, attention=attention)
        self.norm_1 = nn.LayerNorm(c.width, eps=c.eps)
        hidden = c.hidden or 4 * c.width
        self.mlp = nn.Sequential(nn.Linear(c.width, hidden), nn.GELU(), nn.Linear(hidden, c.width))
        self.norm_2 = nn.LayerNorm(c.width, eps=c.eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, key_lengths: Tensor | None) -> Tensor:
        x = self.norm_1(x + self.dropout(self.attn(x, key_lengths)))
        return self.norm_2(x + self.dropout(self.mlp(x)))


class BERT(nn.Module):
    """Token ids to a vector for each token. `attention` has the arguments of tfkern.attention."""

    config_class = BERTConfig

    def __init__(
        self, config: BERTConfig | None = None, attention: Callable[..., Tensor] = fused_attention, pooler: bool = True
    ):
        super().__init__()
        self.config = c = config or BERTConfig()
        self.tokens = nn.Embedding(c.vocab_size, c.width)
        self.positions = nn.Embedding(c.context, c.width)
        self.segments = nn.Embedding(c.segments, c.width)
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, attention) for _ in range(c.layers))
        self.pooler = nn.Linear(c.width, c.width) if pooler else None
        self.apply(functools.partial(_init, std=0.02 * math.sqrt(768 / c.width)))

    def forward(self, ids: Tensor, key_lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """ids (B, N) integers, N <= context -> (B, N, C). key_lengths (B,): how many tokens of each row are no padding;
        segments (B, N): 0 for the first sentence, 1 for the second (default all 0); transformers' token_type_ids."""
        n = ids.shape[1]
        if n > self.config.context:
            raise ValueError(f"ids must have at most {self.config.context} positions, the context, but has {n}; cut them")
        segment = self.segments.weight[0] if segments is None else self.segments(segments)
        x = self.dropout(self.norm(self.tokens(ids) + self.positions.weight[:n] + segment))
        for block in self.blocks:
            x = block(x, key_lengths)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """The sentence vector (B, C) of forward's result (B, N, C), from its first token."""
        if self.pooler is None:
            raise ValueError("pool needs a pooler; build the model with pooler=True")
        return torch.tanh(self.pooler(x[:, 0]))


class MaskedLM(nn.Module):
    """BERT with the head that predicts masked tokens: logits (B, N, vocab_size), from a decoder tied to the token embedding."""

    config_class = BERTConfig

    def __init__(self, config: BERTConfig | None = None, attention: Callable[..., Tensor] = fused_attention):
        super().__init__()
        self.bert = BERT(config, attention, pooler=False)
        c = self.config = self.bert.config
        self.transform = nn.Sequential(nn.Linear(c.width, c.width), nn.GELU(), nn.LayerNorm(c.width, eps=c.eps))
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.transform.apply(functools.partial(_init, std=0.02 * math.sqrt(768 / c.width)))

    def forward(self, ids: Tensor, key_lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        x = self.transform(self.bert(ids, key_lengths, segments))
        return F.linear(x, self.bert.tokens.weight, self.bias)


class Classifier(nn.Module):
    """BERT with a head that classifies a sentence by its pooled vector, for fine-tuning."""

    config_class = BERTConfig

    def __init__(self, config: BERTConfig | None = None, attention: Callable[..., Tensor] = fused_attention):
        super().__init__()
        self.bert = BERT(config, attention)
        c = self.config = self.bert.config
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Linear(c.width, c.classes)
        self.head.apply(functools.partial(_init, std=0.02 * math.sqrt(768 / c.width)))

    def forward(self, ids: Tensor, key_lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """ids (B, N) as BERT takes them -> logits (B, classes)."""
        return self.head(self.dropout(self.bert.pool(self.bert(ids, key_lengths, segments))))


def _init(module: nn.Module, std: float) -> None:
    """The original's 0.02 at its width of 768, and the same variance of outputs at others."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
