"""Rung g: heads side by side. f(X) = [head_1(X) … head_H(X)] Wo, each head C/H wide, dropout on the weights in training.

A head has one softmax, so it looks in one way. H of them cost the same parameters as one of the full width and look in H ways.
Wo mixes what they found. Dropout hides random weights, so that no head can rely on one token alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tfkern.functional import attention as fused_attention
from tfkern.models.ladder.f_head import Head
from tfkern.models.ladder.inputs import checked


class Heads(nn.Module):
    """Multi-head self-attention: (B, N, width) -> (B, N, width), with 4 width² weights (and 4 width biases).

    The three projections of all heads are one, `qkv`; `tfkern.nn.SelfAttention` has the same parameters and names.

    Args:
        width: C, a multiple of heads.
        heads: number of heads, each of dim width / heads.
        dropout: probability with which a softmax weight is dropped in training.
        bias: whether both projections have one.
        attention: a function with the arguments of tfkern.attention, such as tfkern.reference.attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        attention: Callable[..., Tensor] = fused_attention,
    ):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, but they are {width} and {heads}; change either")
        self.heads, self.dropout, self.attention = heads, dropout, attention
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)

    @classmethod
    def of(cls, heads: Sequence[Head]) -> "Heads":
        """Heads of rung f side by side, projected by the identity. Their dims are equal and add up to their width."""
        width = heads[0].query.in_features
        parts = [torch.cat([getattr(head, name).weight for head in heads]) for name in ("query", "key", "value")]
        if any(part.shape != (width, width) for part in parts):
            dims = [head.query.out_features for head in heads]
            raise ValueError(f"heads must have dims that add up to their width {width}, but they are {dims}; add heads")
        layer = cls(width, len(heads), bias=False, attention=heads[0].attention).to(parts[0])
        with torch.no_grad():
            layer.qkv.weight.copy_(torch.cat(parts))  # (3 C, C)
            layer.proj.weight.copy_(torch.eye(width))
        return layer

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """key_lengths (B,) integers: tokens from there on are padding, to which no query attends."""
        b, n, c = checked(x, self.proj.in_features).shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        y = self.attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, key_lengths=key_lengths)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))  # the heads side by side; (B, N, C) @ (C, C)
