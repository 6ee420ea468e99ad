"""Fused attention for PyTorch in hand-written Triton: softmax(scale * Q K^T + bias) V, forward and backward."""

from tfkern.backends import UnsupportedError
from tfkern.functional import attention, attention_packed, attention_varlen, explain
from tfkern.integrations import torch_flash  # noqa: F401  makes its name known to PyTorch
from tfkern.integrations.patching import patch, patched, unpatch
from tfkern.integrations.torch_sdpa import scaled_dot_product_attention
from tfkern.score_mods import ScoreMod

__all__ = [
    "ScoreMod",
    "UnsupportedError",
    "attention",
    "attention_packed",
    "attention_varlen",
    "explain",
    "patch",
    "patched",
    "scaled_dot_product_attention",
    "unpatch",
]
__version__ = "0.2.0"
