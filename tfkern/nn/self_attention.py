"""A self-attention layer."""

from collections.abc import Callable

from torch import Tensor, nn

from tfkern.functional import attention as fused_attention
from tfkern.nn.cache import KeyValueCache


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection: y = proj(attention(qkv(x))).

    The kernel reads query, key and value as views of the packed projection and leaves its output in the order that the
    output projection reads, so there is neither a copy nor a `.contiguous()` between the three.

    Args:
        embed_dim: width C of the input and the output, a multiple of num_heads.
        num_heads: number of heads, each of dim embed_dim / num_heads.
        bias: whether both projections have one.
        is_causal: position i attends to positions j <= i only.
        window: (left, right) as in tfkern.attention.
        dropout: probability with which attention weights are dropped in training.
        attention: a function with the arguments of tfkern.attention, such as tfkern.reference.attention.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, bias: bool = True, is_causal: bool = False,
        window: tuple[int | None, int | None] | None = None, dropout: float = 0.0,
        attention: Callable[..., Tensor] = fused_attention,
    ):  # fmt: skip
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, but they are {embed_dim} and {num_heads}")
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.window = window
        self.dropout = dropout
        self.attention = attention
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C).

        Args:
            key_lengths: (B,) integers: positions from there on are padding, to which no query attends.
            cache: keys and values of the positions before x, to which those of x are appended. Position i of x then attends
                as position length + i.

        Raises: ValueError for a cache together with key_lengths, or in a layer that is not causal.
        """
        if cache is not None and not self.is_causal:
            raise ValueError(
                "a cache needs is_causal=True: else earlier positions attend to later ones, which are not there yet"
            )
        if cache is not None and key_lengths is not None:
            raise ValueError("key_lengths can't be combined with a cache: its positions are all there; leave one out")
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # views, (B, H, N, D) each
        options = {}
        if cache is not None:
            k, v = cache.extended(k, v)
            options = dict(causal_alignment="lower_right")  # the last query stands at the last key
        y = self.attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=self.is_causal, window=self.window,
            key_lengths=key_lengths, **options,
        )  # fmt: skip
        return self.proj(y.transpose(1, 2).reshape(b, n, c))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, is_causal={self.is_causal}, window={self.window}, dropout={self.dropout}"
