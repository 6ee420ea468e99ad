"""Attention layers."""

from tfkern.nn.multihead import MultiheadAttention
from tfkern.nn.self_attention import SelfAttention
from tfkern.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = ["MultiheadAttention", "SelfAttention", "TransformerEncoder", "TransformerEncoderLayer"]
