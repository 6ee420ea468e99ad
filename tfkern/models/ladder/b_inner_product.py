"""Rung b: f(X) = (X W Xᵀ) X. One matrix W, "KQ", says what the inner product of two tokens looks at.

X Xᵀ is symmetric: "not" takes as much from "shabby" as "shabby" takes from "not". With W it need not be.

Queries and keys are this W in two factors: (X Wq) (X Wk)ᵀ = X (Wq Wkᵀ) Xᵀ. A matrix of values needs no place of its own
either, as long as a linear layer U follows: (S X Wv) U = S X (Wv U). Elhage et al., "A Mathematical Framework for Transformer
Circuits" (2021), read trained models by these two products, the QK and the OV circuit.
"""

import torch
from torch import Tensor, nn

from tfkern.models.ladder.inputs import checked, without_padding


class InnerProduct(nn.Module):
    """f(X) = (X W Xᵀ) X: (B, N, width) -> (B, N, width), with width² parameters; W = 1 is rung a. Plain PyTorch."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    @classmethod
    def of(cls, query: nn.Linear, key: nn.Linear) -> "InnerProduct":
        """The layer whose scores are those of queries and keys: W = Wq Wkᵀ. Both map width to the same head dim, no bias."""
        layer = cls(query.in_features).to(query.weight)
        with torch.no_grad():
            layer.weight.copy_(query.weight.T @ key.weight)  # (C, D) @ (D, C); a Linear holds its matrix transposed
        return layer

    def scores(self, x: Tensor) -> Tensor:
        """X W Xᵀ, (B, N, N)."""
        return x @ self.weight @ x.mT  # (B, N, C) @ (C, C) @ (B, C, N)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        x = without_padding(checked(x, len(self.weight)), key_lengths)
        return self.scores(x) @ x  # (B, N, N) @ (B, N, C)


def fold(value: nn.Linear, following: nn.Linear) -> nn.Linear:
    """One linear layer in place of two: following(value(x)) for every x. value has no bias; following's stays."""
    folded = nn.Linear(value.in_features, following.out_features, bias=following.bias is not None).to(value.weight)
    with torch.no_grad():
        folded.weight.copy_(following.weight @ value.weight)  # (out, D) @ (D, C)
        if following.bias is not None:
            folded.bias.copy_(following.bias)
    return folded
