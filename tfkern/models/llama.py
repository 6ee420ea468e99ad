"""Llama, as SmolLM2 has it. Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023).

A decoder of pre-norm blocks without biases: norms by root mean square (Zhang and Sennrich, 2019), rotary positions (Su et al.,
"RoFormer", 2021), query heads that share keys and values in groups (Ainslie et al., "GQA", 2023), and a gated MLP (Shazeer,
"GLU Variants Improve Transformer", 2020). SmolLM2 (Ben Allal et al., 2025) ties the output head to the token embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.functional import attention as fused_attention
from tfkern.models import generation
from tfkern.nn import KeyValueCache
from tfkern.nn.cache import positions_before


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes; the defaults are SmolLM2-135M's, 134,515,008 parameters."""

    vocab_size: int = 49152
    context: int = 8192
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3  # each serves heads / kv_heads query heads
    width: int = 576
    hidden: int = 1536  # width of the MLP's middle
    theta: float = 100_000.0  # the slowest rotary angle turns by about 1 / theta a position
    eps: float = 1e-5
    tied: bool = True  # whether the output head is the token embedding


def rotary(start: int, end: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of p * theta^(-2i / dim) for positions p from start to before end: (end - start, dim / 2) each."""
    speeds = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.arange(start, end, device=device, dtype=torch.float32)[:, None] * speeds
    return angles.cos(), angles.sin()


def rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, H, N, D): dimension i is turned together with dimension i + D / 2, by angle i of its position."""
    cos, sin = (y.to(x.dtype) for y in angles)  # (N, D / 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and fewer key heads than query heads."""

    def __init__(self, c: LlamaConfig, attention: Callable[..., Tensor]):
        super().__init__()
        self.dim = c.width // c.heads
        self.attention = attention
        self.q = nn.Linear(c.width, c.heads * self.dim, bias=False)
        self.k = nn.Linear(c.width, c.kv_heads * self.dim, bias=False)
        self.v = nn.Linear(c.width, c.kv_heads * self.dim, bias=False)
        self.proj = nn.Linear(c.heads * self.dim, c.width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = rotated(q, angles), rotated(k, angles)  # (B, heads, N, D), (B, kv_heads, N, D)
        if cache is not None:
            k, v = cache.extended(k, v)
        y = self.attention(q, k, v, is_causal=True, enable_gqa=True, causal_alignment="lower_right")
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(c.width, c.hidden, bias=False)
        self.up = nn.Linear(c.width, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: LlamaConfig, attention: Callable[..., Tensor]):
        super().__init__()
        self.norm_1 = nn.RMSNorm(c.width, eps=c.eps)
        self.attn = Attention(c, attention)
        self.norm_2 = nn.RMSNorm(c.width, eps=c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        x = x + self.attn(self.norm_1(x), angles, cache)
        return x + self.mlp(self.norm_2(x))


class Llama(nn.Module):
    """Token ids to logits of the next token. `attention` has the arguments of tfkern.attention."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig | None = None, attention: Callable[..., Tensor] = fused_attention):
        super().__init__()
        self.config = c = config or LlamaConfig()
        if c.width % (2 * c.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads, since rotary turns pairs, but they are {c.width} and {c.heads}"
            )
        if c.heads % c.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, but they are {c.heads} and {c.kv_heads}")
        self.tokens = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(Block(c, attention) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=c.eps)
        self.head = None if c.tied else nn.Linear(c.width, c.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor, cache: list[KeyValueCache] | None = None, last: bool = False) -> Tensor:
        """Logits of the token after each. Arguments, result and errors as GPT.forward's."""
        c = self.config
        start = positions_before(cache, len(self.blocks))
        end = start + ids.shape[1]
        if end > c.context:
            raise ValueError(f"ids must have at most {c.context} positions, the context, but has {end}; cut them")
        angles = rotary(start, end, c.width // c.heads, c.theta, ids.device)
        x = self.tokens(ids)  # (B, N, C)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, cache[i] if cache else None)
        x = self.norm(x[:, -1:] if last else x)
        return F.linear(x, self.tokens.weight if self.head is None else self.head.weight)

    def generate(
        self, ids: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        generator: torch.Generator | None = None, cache: bool = True, stop: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Append at most `count` tokens to ids (B, N). The arguments are those of tfkern.models.generation.stream."""
        return generation.generate(self, ids, count, temperature, top_k, top_p, generator, cache, stop)
