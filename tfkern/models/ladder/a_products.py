"""Rung a: f(X) = X Xᵀ X. Every token takes from every other as much as their inner product says. There are no parameters.

A sentence is a matrix X of N tokens, each a row of C numbers. The two layers that a multilayer perceptron offers for it fail:

- one layer over all tokens, laid end to end, has (N C)² weights and fits one N alone;
- one layer over the embedding, the same for every token, fits any N, but no token learns of another.

X Xᵀ X fits any N, lets all tokens interact, and is the start of everything that follows.
"""

from torch import Tensor, nn

from tfkern.models.ladder.inputs import checked, without_padding


class AllTokens(nn.Module):
    """One linear layer over all tokens at once: (B, tokens, width) -> (B, tokens, width), with (tokens * width)² weights."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.linear = nn.Linear(tokens * width, tokens * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """ValueError for a sentence of any other length: the weights of further tokens don't exist."""
        if checked(x, self.width).shape[1] != self.tokens:
            raise ValueError(
                f"x must have {self.tokens} tokens, for which this layer has weights, but has {x.shape[1]};"
                " build AllTokens for that number, or use a rung of the ladder"
            )
        return self.linear(x.flatten(1)).view_as(x)  # (B, N C) @ (N C, N C)


class EachToken(nn.Module):
    """One linear layer over the embedding: (B, N, width) -> (B, N, width). Token i of the result depends on token i alone."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        return self.linear(without_padding(checked(x, self.linear.in_features), key_lengths))  # (B, N, C) @ (C, C)


class Products(nn.Module):
    """f(X) = X Xᵀ X: (B, N, C) -> (B, N, C), f_i = Σ_j (x_i · x_j) x_j. Plain PyTorch: there is no softmax to fuse."""

    def scores(self, x: Tensor) -> Tensor:
        """X Xᵀ, (B, N, N): how much token i takes from token j."""
        return x @ x.mT  # (B, N, C) @ (B, C, N)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """key_lengths (B,) integers: tokens from there on are padding, which adds nothing to any token."""
        x = without_padding(checked(x), key_lengths)
        return self.scores(x) @ x  # (B, N, N) @ (B, N, C)
