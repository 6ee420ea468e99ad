"""Jagged nested tensors, attended as packed sequences: their offsets are the cu_seqlens."""

import torch
from torch import Tensor

from tfkern import compat


def packed(query: Tensor, key: Tensor, value: Tensor, key_lengths) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(query, key, value, cu_seqlens_q, cu_seqlens_k) as attention_varlen takes them, of nested tensors (B, H, ragged, D).

    Raises ValueError if they are not of layout torch.jagged with the ragged dim behind the heads, and for key_lengths.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.layout != torch.jagged or x.dim() != 4:
            given = f"{x.layout} of {x.dim()} dims" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{name} must be a nested tensor (B, H, ragged, D) of layout torch.jagged, as query is nested, but is {given}"
            )
        if (dim := compat.ragged_dim(x)) != 2:
            raise ValueError(f"{name} must be (B, H, ragged, D), but dim {dim} is the ragged one; transpose(1, 2) makes it so")
        if x.lengths() is not None:
            raise ValueError(f"{name} must have no holes between its sequences; .contiguous() closes them")
    if key_lengths is not None:
        raise ValueError("key_lengths can't be given with nested tensors, which have their lengths; drop it")
    q, k, v = (x.transpose(1, 2).values() for x in (query, key, value))
    return q, k, v, query.offsets(), key.offsets()


def nested(result, query: Tensor):
    """The result of the packed call with out nested like query. With lse the result is (out, lse (H, total))."""
    out = result[0] if isinstance(result, tuple) else result
    out = torch.nested.nested_tensor_from_jagged(out, query.offsets()).transpose(1, 2)
    return (out, result[1]) if isinstance(result, tuple) else out
