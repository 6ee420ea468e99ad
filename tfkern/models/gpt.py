"""GPT-2. Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).

A decoder of pre-norm blocks with learned positions, tanh-approximated GELU, and an output head tied to the token embedding.
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
class GPTConfig:
    """Sizes; the defaults are GPT-2's smallest, 124,439,808 parameters."""

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

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x)))
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

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N) integers, N <= context -> logits (B, N, vocab_size)."""
        n = ids.shape[1]
        if n > self.config.context:
            raise ValueError(f"ids must have at most {self.config.context} positions, the context, but has {n}; cut them")
        x = self.dropout(self.tokens(ids) + self.positions.weight[:n])  # (B, N, C)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)  # the tied head

    @torch.no_grad()
    def generate(
        self, ids: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        generator=None,
    ) -> Tensor:  # fmt: skip
        """Append `count` tokens to ids (B, N). temperature 0 takes the likeliest; top_k samples among the k likeliest,
        top_p among the likeliest whose probabilities together first reach p."""
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more and finite, but is {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be 1 or more, or None, but is {top_k}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, or None, but is {top_p}")
        for _ in range(count):
            logits = self(ids[:, -self.config.context :])[:, -1]  # (B, vocab_size)
            if temperature == 0.0:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                below = (logits - logits.amax(-1, keepdim=True)).double()  # the lowest temperature makes no infinity of it
                shares = torch.softmax(below / temperature, -1)
                if top_p is not None:
                    ordered, order = shares.sort(-1, descending=True)
                    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
                    shares = torch.zeros_like(shares).scatter(-1, order, ordered)
                chosen = torch.multinomial(shares, 1, generator=generator)
            ids = torch.cat([ids, chosen], 1)
        return ids


def _init(module: nn.Module, std: float) -> None:
    """The original's 0.02 at its width of 768, and the same variance of outputs at others."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
