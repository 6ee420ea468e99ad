"""Rung c: f(X)_i = Σ_j x_j Wv. Values only: each token says what it has to say, and all is summed.

It is what is left of rung b when every score is 1. It fails: the sum is the same for every token i, and it is additive. "not"
adds the same number to a sentence whatever stands beside it, so that

    logit(not shabby) + logit(great) = logit(shabby) + logit(not great)

for any Wv and any linear readout, while the truth wants both on the left positive and both on the right negative.
"""

from torch import Tensor, nn

from tfkern.models.ladder.inputs import checked, without_padding


class Values(nn.Module):
    """f(X) = 1 1ᵀ X Wv: (B, N, width) -> (B, N, width), each token the same; width² parameters. Plain PyTorch."""

    def __init__(self, width: int):
        super().__init__()
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        x = without_padding(checked(x, self.value.in_features), key_lengths)
        return self.value(x).sum(1, keepdim=True).expand_as(x)  # (B, N, C) @ (C, C), summed over N
