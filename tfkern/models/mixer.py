"""MLP-Mixer. Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision" (2021).

An image is cut into patches, each a token; a block mixes first among tokens, then among channels, each by an MLP after a norm.
The class is read off the mean of the tokens. There is no attention in it.
"""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class MixerConfig:
    """Sizes; the defaults are Mixer-B/16's at 224 x 224 pixels and 1000 classes."""

    image: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    layers: int = 12
    width: int = 768
    tokens_hidden: int = 384
    channels_hidden: int = 3072
    eps: float = 1e-6

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    """x + tokens mixed in norm(x), then x + channels mixed in norm(x)."""

    def __init__(self, c: MixerConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(c.width, eps=c.eps)
        self.tokens = _mlp(c.patches, c.tokens_hidden)
        self.norm_2 = nn.LayerNorm(c.width, eps=c.eps)
        self.channels = _mlp(c.width, c.channels_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm_1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm_2(x))


class Mixer(nn.Module):
    """Images to logits of their classes."""

    config_class = MixerConfig

    def __init__(self, config: MixerConfig | None = None):
        super().__init__()
        self.config = c = config or MixerConfig()
        if c.image % c.patch:
            raise ValueError(f"image must be a multiple of patch, but they are {c.image} and {c.patch}")
        self.embed = nn.Conv2d(c.channels, c.width, kernel_size=c.patch, stride=c.patch)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.head = nn.Linear(c.width, c.classes)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, image, image) -> logits (B, classes)."""
        x = self.embed(images).flatten(2).transpose(1, 2)  # (B, patches, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))
