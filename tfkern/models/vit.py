"""ViT. Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (2021).

An image is cut into patches, each a token, with a class token before them and learned positions; an encoder of pre-norm blocks
with exact GELU; the class is read off the class token. DINOv2 (Oquab et al., 2023) is this model without a classifier, with
LayerScale (Touvron et al., "Going deeper with Image Transformers", 2021) on each residual branch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.functional import attention as fused_attention
from tfkern.nn import SelfAttention


@dataclass(frozen=True)
class ViTConfig:
    """Sizes; the defaults are ViT-B/16's at 224 x 224 pixels and 1000 classes, 86,567,656 parameters and 197 tokens."""

    image: int = 224  # height and width that the position embeddings are for; others interpolate them
    patch: int = 16
    channels: int = 3
    classes: int = 1000  # 0: no classifier
    layers: int = 12
    heads: int = 12
    width: int = 768
    hidden: int | None = None  # width of the MLP's middle; None is 4 * width
    dropout: float = 0.0  # after the embeddings and each residual branch
    eps: float = 1e-6
    layer_scale: bool = False  # whether each residual branch is multiplied by a learned vector
    antialias: bool = False  # whether interpolated position embeddings are filtered: timm does so, transformers does not

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


class LayerScale(nn.Module):
    """Each channel times a learned number, at first 1."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); LayerScale, where there is one, scales both branches."""

    def __init__(self, c: ViTConfig, attention: Callable[..., Tensor]):
        super().__init__()
        self.norm_1 = nn.LayerNorm(c.width, eps=c.eps)
        self.attn = SelfAttention(c.width, c.heads, attention=attention)
        self.norm_2 = nn.LayerNorm(c.width, eps=c.eps)
        hidden = c.hidden or 4 * c.width
        self.mlp = nn.Sequential(nn.Linear(c.width, hidden), nn.GELU(), nn.Linear(hidden, c.width))
        self.scale_1, self.scale_2 = (LayerScale(c.width) if c.layer_scale else nn.Identity() for _ in range(2))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.scale_1(self.attn(self.norm_1(x))))
        return x + self.dropout(self.scale_2(self.mlp(self.norm_2(x))))


class ViT(nn.Module):
    """Images to logits of their classes. `attention` has the arguments of tfkern.attention."""

    config_class = ViTConfig

    def __init__(self, config: ViTConfig | None = None, attention: Callable[..., Tensor] = fused_attention):
        super().__init__()
        self.config = c = config or ViTConfig()
        if c.image % c.patch:
            raise ValueError(f"image must be a multiple of patch, but they are {c.image} and {c.patch}")
        self.embed = nn.Conv2d(c.channels, c.width, kernel_size=c.patch, stride=c.patch)  # one linear map of each patch
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.positions = nn.Parameter(torch.empty(1, 1 + c.patches, c.width))
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, attention) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.head = nn.Linear(c.width, c.classes) if c.classes else nn.Identity()
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.apply(functools.partial(_init, std=0.02 * math.sqrt(768 / c.width)))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W), H and W multiples of patch -> logits (B, classes), or, without a classifier, the class
        token (B, C). ValueError for other images."""
        return self.head(self.features(images)[:, 0])

    def features(self, images: Tensor) -> Tensor:
        """images as in forward -> (B, 1 + patches, C): the class token, then the patches row by row, after the last norm."""
        c = self.config
        if images.dim() != 4 or images.shape[1] != c.channels or any(n < c.patch or n % c.patch for n in images.shape[2:]):
            raise ValueError(
                f"images must be (B, {c.channels}, H, W), H and W multiples of the patch size, {c.patch}, but are "
                f"{tuple(images.shape)}; resize or cut them"
            )
        x = self.embed(images)  # (B, C, rows, columns)
        positions = self.positions_of(*x.shape[2:])
        x = x.flatten(2).transpose(1, 2)  # (B, patches, C)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        x = self.dropout(x + positions)  # (B, 1 + patches, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def positions_of(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, 1 + rows * columns, C) of a grid of patches: the learned ones, or for another grid a bicubic
        interpolation of them. The class token keeps its own. (Section 3.2 of the paper interpolates, too.)"""
        side = self.config.image // self.config.patch
        if (rows, columns) == (side, side):
            return self.positions
        grid = self.positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, C, side, side)
        exact = grid.to(torch.promote_types(grid.dtype, torch.float32))  # CPUs filter no bfloat16
        grid = F.interpolate(exact, (rows, columns), mode="bicubic", antialias=self.config.antialias).to(grid.dtype)
        return torch.cat([self.positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def _init(module: nn.Module, std: float) -> None:
    """The original's 0.02 at its width of 768, and the same variance of outputs at others."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
