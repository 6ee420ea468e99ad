"""Rung d: f(X) = 1/√D (X Wq) (X Wk)ᵀ (X Wv). Queries ask, keys answer, values are what is passed on.

Why 1/√D: a score is a sum of D products of numbers with standard deviation 1, so its own is √D. Divided by √D it is 1 at any
D: what comes next, the softmax of rung e, sees scores of the same size whatever the width. With 1 or 1/T they grow as √D, with
1/D they shrink as 1/√D (`measures.deviations` measures it). Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

The output's is scale √(T² + T D) for T tokens: T D as if scores and values were drawn apart, and T² because k_j and v_j come
from the same x_j. No scale keeps that at every D. Under the softmax of rung e, 1/√D does: √(e/T) for any large D.
"""

import math

from torch import Tensor, nn

from tfkern.models.ladder.inputs import checked, without_padding


class QueriesKeysValues(nn.Module):
    """f(X) = scale Q Kᵀ V: (B, N, width) -> (B, N, width), with 3 width² parameters. Plain PyTorch.

    Args:
        width: C of the input, and D of queries, keys and values.
        scale: factor of the scores; None means 1 / sqrt(width). With scale 1 and Wv = 1 it is rung b with W = Wq Wkᵀ.
    """

    def __init__(self, width: int, scale: float | None = None):
        super().__init__()
        self.scale = 1 / math.sqrt(width) if scale is None else scale
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=width**-0.5)  # x of standard deviation 1 keeps it

    def scores(self, x: Tensor) -> Tensor:
        """scale Q Kᵀ, (B, N, N)."""
        return self.query(x) @ self.key(x).mT * self.scale  # (B, N, D) @ (B, D, N)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        x = without_padding(checked(x, self.query.in_features), key_lengths)
        return self.scores(x) @ self.value(x)  # (B, N, N) @ (B, N, D)
