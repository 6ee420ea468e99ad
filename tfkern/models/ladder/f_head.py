"""Rung f: a head. Queries, keys and values get a width of their own: D numbers, not the C of the embedding.

Wq, Wk and Wv map C to D. A head with D < C is cheap, and looks at one thing: its scores are X W Xᵀ with a W of rank D.
"""

from collections.abc import Callable

from torch import Tensor, nn

from tfkern.functional import attention as fused_attention
from tfkern.models.ladder.inputs import checked


class Head(nn.Module):
    """softmax(Q Kᵀ / √D) V: (B, N, width) -> (B, N, head_dim), with 3 width head_dim parameters. head_dim = width is rung e.

    `attention` has the arguments of tfkern.attention, such as tfkern.reference.attention.
    """

    def __init__(self, width: int, head_dim: int, attention: Callable[..., Tensor] = fused_attention):
        super().__init__()
        self.attention = attention
        self.query, self.key, self.value = (nn.Linear(width, head_dim, bias=False) for _ in range(3))
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """key_lengths (B,) integers: tokens from there on are padding, to which no query attends."""
        x = checked(x, self.query.in_features)
        q, k, v = (linear(x)[:, None] for linear in (self.query, self.key, self.value))  # (B, 1, N, D)
        return self.attention(q, k, v, key_lengths=key_lengths)[:, 0]
