"""Rung h: the block. Attention moves between tokens, an MLP works on each; both are added to what was there.

    x ← x + heads(norm(x))      3 C² weights of queries, keys and values, C² of the projection
    x ← x + mlp(norm(x))        8 C² weights: C to 4 C and back

At C = 768 these are 12 · 768² = 7,077,888 weights. With 6,912 biases and two norms of 1,536 the block has 7,087,872 parameters.
Twelve of them are the 85 million of BERT-base, GPT-2 small and ViT-B/16. Skip connections are by He et al., "Deep Residual
Learning for Image Recognition" (2016); the norms stand inside the branches as in GPT-2 and ViT.
"""

from collections.abc import Callable

from torch import Tensor, nn

from tfkern.functional import attention as fused_attention
from tfkern.models.ladder.g_heads import Heads


class Block(nn.Module):
    """x + heads(norm(x)), then x + mlp(norm(x)): (B, N, width) -> (B, N, width). The parameters are those of ViT's block.

    Args:
        width: C, a multiple of heads.
        heads: number of heads.
        dropout: probability with which a softmax weight is dropped in training.
        attention: a function with the arguments of tfkern.attention, such as tfkern.reference.attention.
    """

    def __init__(
        self, width: int = 768, heads: int = 12, dropout: float = 0.0, attention: Callable[..., Tensor] = fused_attention
    ):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attn = Heads(width, heads, dropout, attention=attention)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """key_lengths (B,) integers: tokens from there on are padding, to which no query attends."""
        x = x + self.attn(self.norm_1(x), key_lengths)
        return x + self.mlp(self.norm_2(x))
