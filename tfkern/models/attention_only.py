"""Attention-only transformers. Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).

Heads that read the residual stream and add to it: no MLPs, no norms, no biases. What the model computes is therefore a sum of
paths from the embedding to the logits, and each path is a product of weight matrices. Positions are added to what queries and
keys are made of, and to nothing else (Press et al., "Shortformer", 2021), so the stream holds tokens alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfkern.functional import attention as fused_attention


@dataclass(frozen=True)
class AttentionOnlyConfig:
    """Sizes. `layers` may be 0: then the next token follows from the current one alone."""

    vocab_size: int = 64
    context: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 64

    def __post_init__(self):
        for name, least in (("vocab_size", 1), ("context", 1), ("layers", 0), ("heads", 1), ("width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, but is {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, but they are {self.width} and {self.heads}")


class Heads(nn.Module):
    """One layer: heads that each add attention(Q, K, V) W_O to the stream. Each head has matrices of its own."""

    def __init__(self, c: AttentionOnlyConfig, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention = attention
        into, out_of = (c.heads, c.width, c.width // c.heads), (c.heads, c.width // c.heads, c.width)
        # Small queries and keys: at the start each head looks nearly everywhere alike, and has everything to learn from.
        self.W_Q, self.W_K = (nn.Parameter(0.3 * torch.randn(into) / math.sqrt(c.width)) for _ in range(2))
        self.W_V = nn.Parameter(torch.randn(into) / math.sqrt(c.width))
        self.W_O = nn.Parameter(torch.randn(out_of) / math.sqrt(c.width * max(1, 2 * c.layers)))

    def queries_and_keys(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, C) and positions (N, C) -> q and k, (B, H, N, D) each."""
        return _each(x + positions, self.W_Q), _each(x + positions, self.W_K)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the heads add to x (B, N, C), summed over the heads."""
        q, k = self.queries_and_keys(x, positions)
        o = self.attention(q, k, _each(x, self.W_V), is_causal=True)  # (B, H, N, D)
        return o.transpose(1, 2).flatten(2) @ self.W_O.flatten(0, 1)  # (B, N, H D) @ (H D, C)


class AttentionOnly(nn.Module):
    """Token ids to logits of the next token. `attention` has the arguments of tfkern.attention."""

    def __init__(self, config: AttentionOnlyConfig | None = None, attention: Callable[..., Tensor] = fused_attention):
        super().__init__()
        self.config = c = config or AttentionOnlyConfig()
        self.W_E = nn.Parameter(torch.randn(c.vocab_size, c.width))
        self.W_P = nn.Parameter(torch.randn(c.context, c.width))
        self.layers = nn.ModuleList(Heads(c, attention) for _ in range(c.layers))
        self.W_U = nn.Parameter(torch.randn(c.width, c.vocab_size) / c.width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N) integers, N <= context -> logits (B, N, vocab_size)."""
        x, positions = self.embedded(ids)
        for heads in self.layers:
            x = x + heads(x, positions)
        return x @ self.W_U

    def embedded(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, N) -> the stream before the first layer (B, N, C), and the positions (N, C)."""
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.config.context:
            raise ValueError(
                f"ids must be (batch, length) with 1 to {self.config.context} positions, the context, "
                f"but has shape {tuple(ids.shape)}; cut or reshape them"
            )
        return self.W_E[ids], self.W_P[: ids.shape[1]]


def _each(x: Tensor, weights: Tensor) -> Tensor:
    """x (B, N, C) by the weights (H, C, D) of each head -> (B, H, N, D)."""
    return torch.einsum("bnc,hcd->bhnd", x, weights)
