"""What is to be computed, without the tensors: shapes, dtypes, the band of visible keys. All checks and messages are here."""

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENTS = ("upper_left", "lower_right")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Problem:
    """One call of attention. Query i sees key j where i + shift - left <= j <= i + shift + right (None: unbounded side) and j
    is below the number of keys; shift is 0, or keys - queries under lower_right. With key lengths, a batch has that many keys.
    """

    batch: int
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    left: int | None
    right: int | None
    lower_right: bool
    has_key_lengths: bool

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @classmethod
    def build(
        cls, query: Tensor, key: Tensor, value: Tensor, *, is_causal=False, scale=None, enable_gqa=False,
        causal_alignment="upper_left", window=None, key_lengths=None,
    ) -> "Problem":  # fmt: skip
        """Check the arguments of tfkern.attention and describe the call. ValueError, TypeError or NotImplementedError."""
        _check_tensors(query, key, value)
        batch, heads, n_q, head_dim = query.shape
        _, kv_heads, n_k, v_head_dim = value.shape
        _check_heads(heads, kv_heads, enable_gqa)
        _check_key_lengths(key_lengths, batch, n_k, query.device)
        for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, but is {flag!r}")
        if causal_alignment not in ALIGNMENTS:
            raise ValueError(f"causal_alignment must be one of {ALIGNMENTS}, but is {causal_alignment!r}")
        left, right = _band(window, is_causal, n_q + n_k)
        return cls(
            batch, heads, kv_heads, n_q, n_k, head_dim, v_head_dim, query.dtype, query.device, _scale(scale, head_dim),
            left, right, causal_alignment == "lower_right", key_lengths is not None,
        )  # fmt: skip


def _check_tensors(query, key, value) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), but has shape {tuple(x.shape)}; "
                "add the missing ones with unsqueeze"
            )
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be one of {', '.join(map(str, DTYPES))}, but is {query.dtype}; convert it with .to(dtype)")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, but is {x.dtype}; convert one of them")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, but is on {x.device}; move one of them")
        if x.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} must have the batch size of query, {query.shape[0]}, but has shape {tuple(x.shape)}; "
                "repeat it with .expand, which copies nothing"
            )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have the head dim of query, {query.shape[3]}, but has shape {tuple(key.shape)}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value must have the heads and the length of key, {tuple(key.shape[1:3])}, but has shape {tuple(value.shape)}"
        )


def _check_heads(heads: int, kv_heads: int, enable_gqa: bool) -> None:
    if heads == kv_heads:
        return
    if not enable_gqa:
        raise ValueError(
            f"query has {heads} heads, key and value have {kv_heads}; equal numbers are wanted, or enable_gqa=True to let "
            "groups of query heads share a key head"
        )
    if min(heads, kv_heads) == 0 or heads % kv_heads:
        raise ValueError(
            f"with enable_gqa the heads of query, {heads}, must be a multiple of those of key and value, {kv_heads}"
        )


def _check_key_lengths(key_lengths, batch: int, n_k: int, device: torch.device) -> None:
    if key_lengths is None:
        return
    if not isinstance(key_lengths, Tensor):
        raise TypeError(
            f"key_lengths must be a tensor of {batch} integers, but is {type(key_lengths).__name__}; torch.tensor(…) makes one"
        )
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths must be int32 or int64, but is {key_lengths.dtype}")
    if key_lengths.shape != (batch,):
        raise ValueError(f"key_lengths must have shape ({batch},), one length a batch, but has {tuple(key_lengths.shape)}")
    if key_lengths.device != device:
        raise ValueError(f"key_lengths must be on the device of query, {device}, but is on {key_lengths.device}; move it")
    # On a GPU a look at the values would stop the stream: there the kernels clamp them to 0..Nk instead.
    if device.type == "cpu" and batch and not 0 <= int(key_lengths.min()) <= int(key_lengths.max()) <= n_k:
        raise ValueError(f"key_lengths must lie in 0..{n_k}, the length of key, but are {key_lengths.tolist()}")


def _scale(scale, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    if isinstance(scale, Tensor):
        raise NotImplementedError("scale as a tensor is not built yet; pass a number, for instance scale.item()")
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number or None (1 / sqrt(head_dim)), but is {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, but is {scale}")
    return float(scale)


def _band(window, is_causal: bool, unbounded: int) -> tuple[int | None, int | None]:
    """(left, right) of window and is_causal together. A side of `unbounded` or more hides nothing: it becomes that number."""
    left, right = _window(window)
    if is_causal:
        right = 0
    return tuple(None if side is None else min(side, unbounded) for side in (left, right))


def _window(window) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) of integers or None, but is {window!r}")
    for name, side in zip(("left", "right"), window, strict=True):
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, numbers.Integral):
            raise TypeError(f"window's {name} must be an integer or None, but is {side!r}")
        if side < 0:
            raise ValueError(f"window's {name} must be 0 or more, but is {side}; None means unbounded")
    return tuple(None if side is None else int(side) for side in window)
