"""Rung e: f(X) = softmax(Q Kᵀ / √D) V. The scores of a token become weights: positive, with the sum 1.

The output is now an average of values. It doesn't grow with the number of tokens, one large score can't drown everything, and
the weights can be read. From here on the fused kernels compute it: `tfkern.attention` never stores the N x N matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tfkern.functional import attention as fused_attention
from tfkern.models.ladder.d_queries_keys_values import QueriesKeysValues
from tfkern.models.ladder.inputs import checked


class SoftmaxAttention(QueriesKeysValues):
    """softmax(scale Q Kᵀ) V: (B, N, width) -> (B, N, width). The parameters and their names are rung d's.

    `attention` has the arguments of tfkern.attention, such as tfkern.reference.attention.
    """

    def __init__(self, width: int, scale: float | None = None, attention: Callable[..., Tensor] = fused_attention):
        super().__init__(width, scale)
        self.attention = attention

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """key_lengths (B,) integers: tokens from there on are padding, to which no query attends."""
        x = checked(x, self.query.in_features)
        q, k, v = (linear(x)[:, None] for linear in (self.query, self.key, self.value))  # (B, 1, N, D)
        return self.attention(q, k, v, scale=self.scale, key_lengths=key_lengths)[:, 0]


def weights(query: Tensor, key: Tensor, attention: Callable[..., Tensor] = fused_attention, **options) -> Tensor:
    """The softmax weights that the fused kernels use, (B, H, Nq, Nk): attention over values that are the identity matrix.

    query (B, H, Nq, D), key (B, H, Nk, D); options as in tfkern.attention. It is for looking: N² numbers are stored.
    """
    identity = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
    return attention(query, key, identity.expand(*key.shape[:2], -1, -1), **options)  # P @ 1
