"""Fused attention for PyTorch in hand-written Triton: softmax(scale * Q K^T) V, forward and backward."""

from tfkern.backends import UnsupportedError
from tfkern.functional import attention, explain

__all__ = ["UnsupportedError", "attention", "explain"]
__version__ = "0.1.0"
