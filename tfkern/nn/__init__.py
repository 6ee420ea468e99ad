"""Attention layers."""

from tfkern.nn.cache import KeyValueCache
from tfkern.nn.multihead import MultiheadAttention
from tfkern.nn.self_attention import SelfAttention
from tfkern.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = ["KeyValueCache", "MultiheadAttention", "SelfAttention", "TransformerEncoder", "TransformerEncoderLayer"]
