"""MLP-Mixer. Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision" (2021).

An image is cut into patches, as for ViT. Each block has an MLP over the positions, the same for every channel, and one over the
channels, the same for every position; both are pre-norm with exact GELU. The class is read off the mean over the positions.
The MLP over the positions has a weight for each pair of hidden unit and position, so the model takes images of one size only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class MixerConfig:
    """Sizes; the defaults are Mixer-B/16's at 224 x 224 pixels and 1000 classes, 59,880,472 parameters and 196 positions."""

    image: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    layers: int = 12
    width: int = 768
    tokens_hidden: int = 384  # width of the middle of the MLP over positions
    channels_hidden: int = 3072  # of the one over channels
    eps: float = 1e-6

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


class Block(nn.Module):
    """x + mlp(norm(x)) over the positions, then over the channels."""

    def __init__(self, c: MixerConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(c.width, eps=c.eps)
        self.mlp_tokens = _mlp(c.patches, c.tokens_hidden)
        self.norm_2 = nn.LayerNorm(c.width, eps=c.eps)
        self.mlp_channels = nn.Sequential(
            nn.Linear(c.width, c.channels_hidden), nn.GELU(), nn.Linear(c.channels_hidden, c.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm_1(x).mT).mT  # the MLP sees (B, C, positions)
        return x + self.mlp_channels(self.norm_2(x))


class Mixer(nn.Module):
    """Images to logits of their classes. The model has no attention: the argument of that name, which all models here have, is
    not used."""

    config_class = MixerConfig

    def __init__(self, config: MixerConfig | None = None, attention: Callable[..., Tensor] | None = None):
        super().__init__()
        self.config = c = config or MixerConfig()
        if c.image % c.patch:
            raise ValueError(f"image must be a multiple of patch, but they are {c.image} and {c.patch}")
        self.embed = nn.Conv2d(c.channels, c.width, kernel_size=c.patch, stride=c.patch)  # one linear map of each patch
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.head = nn.Linear(c.width, c.classes)
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, image, image) -> logits (B, classes). ValueError for images of another size."""
        c = self.config
        if tuple(images.shape[1:]) != (c.channels, c.image, c.image):
            raise ValueError(
                f"images must be (B, {c.channels}, {c.image}, {c.image}), because Mixer has weights for exactly {c.patches} "
                f"positions, but are {tuple(images.shape)}; resize them, or take ViT, which interpolates its positions"
            )
        x = self.embed(images).flatten(2).mT  # (B, positions, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _init(module: nn.Module) -> None:
    """Weights of variance 1 / inputs, as in the original: an output has the variance of the inputs."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
