"""What every rung does with its input: check it, and take padding out of a plain sum."""

import torch
from torch import Tensor


def checked(x: Tensor, width: int | None = None) -> Tensor:
    """x if it is (B, N, C), with C = width where that is given; ValueError otherwise."""
    if x.dim() != 3 or (width is not None and x.shape[-1] != width):
        wanted = f"(batch, tokens, {'width' if width is None else width})"
        raise ValueError(f"x must have the shape {wanted}, but has {tuple(x.shape)}; embed the tokens to that width first")
    return x


def without_padding(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """x (B, N, C) with zeros from token key_lengths[b] on: what is zero adds nothing to a sum. key_lengths (B,) integers."""
    if key_lengths is None:
        return x
    real = torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]  # (B, N)
    return x * real[..., None]
