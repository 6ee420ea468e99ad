"""GPT-2. Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).

A decoder of pre-norm blocks with learned positions, tanh-approximated GELU, and an output head tied to the token embedding.
The causal self-attention is in tfkern/nn/self_attention.py, one for all models.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.functional import attention as fused_attention
from tfkern.models import generation
from tfkern.nn import KeyValueCache, SelfAttention
from tfkern.nn.cache import positions_before


@dataclass(frozen=True)
class GPTConfig:
    """Sizes; the defaults are GPT-2's smallest, 124,439,808 parameters.

    nanoGPT calls context block_size, layers n_layer, heads n_head, and width n_embd.
    """

    vocab_size: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    hidden: int | None = None  # width of the MLP's middle; None is 4 * width
    gelu: str = "tanh"  # GPT-2's approximation; "none" is the exact function, as in nanoGPT
    eps: float = 1e-5
    dropout: float = 0.0  # after the embeddings and each residual branch; the original trains with 0.1


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: GPTConfig, attention: Callable[..., Tensor]):
        super().__init__()
        self.norm_1 = nn.LayerNorm(c.width, eps=c.eps)
        self.attn = SelfAttention(c.width, c.heads, is_causal=True, attention=attention)
        self.norm_2 = nn.LayerNorm(c.width, eps=c.eps)
        hidden = c.hidden or 4 * c.width
        self.mlp = nn.Sequential(nn.Linear(c.width, hidden), nn.GELU(c.gelu), nn.Linear(hidden, c.width))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x), cache=cache))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    """Token ids to logits of the next token. `attention` has the arguments of tfkern.attention."""

    config_class = GPTConfig

    def __init__(self, config: GPTConfig | None = None, attention: Callable[..., Tensor] = fused_attention):
        super().__init__()
        self.config = c = config or GPTConfig()
        self.tokens = nn.Embedding(c.vocab_size, c.width)
        self.positions = nn.Embedding(c.context, c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, attention) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        std = 0.02 * math.sqrt(768 / c.width)
        self.apply(functools.partial(_init, std=std))
        for block in self.blocks:  # the residual stream sums 2 * layers branches: keep its variance
            for last in (block.attn.proj, block.mlp[-1]):
                nn.init.normal_(last.weight, std=std / math.sqrt(2 * c.layers))

    def forward(self, ids: Tensor, cache: list[KeyValueCache] | None = None, last: bool = False) -> Tensor:
        """Logits of the token after each.

        Args:
            ids: (B, N) integers.
            cache: one for each block, of the tokens before ids; those of ids are appended. None: ids are the first tokens.
            last: only of the token after the last, as generating needs.

        Returns: (B, N, vocab_size), with last=True (B, 1, vocab_size).

        Raises: ValueError for more tokens than `context`, those before ids included.
        """
        start = positions_before(cache, len(self.blocks))
        end = start + ids.shape[1]
        if end > self.config.context:
            raise ValueError(f"ids must have at most {self.config.context} positions, the context, but has {end}; cut them")
        x = self.dropout(self.tokens(ids) + self.positions.weight[start:end])  # (B, N, C)
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        x = self.norm(x[:, -1:] if last else x)
        return F.linear(x, self.tokens.weight)  # the tied head

    def generate(
        self, ids: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        generator: torch.Generator | None = None, cache: bool = True, stop: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Append at most `count` tokens to ids (B, N). The arguments are those of tfkern.models.generation.stream."""
        return generation.generate(self, ids, count, temperature, top_k, top_p, generator, cache, stop)


def _init(module: nn.Module, std: float) -> None:
    """The original's 0.02 at its width of 768, and the same variance of outputs at others."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
