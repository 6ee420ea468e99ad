"""The functions of the flash-attn package, by their names and arguments: change the import, and the code runs.

Common to all of them:

- Lengths stand before heads, (batch, length, heads, head_dim), or packed (total, heads, head_dim), in the result as well, which
  has the memory order of the queries. Keys and values may have fewer heads, whose number divides the queries'.
- `causal` and `window_size` = (left, right), any negative number meaning unbounded, are aligned to the lower right: with
  shift = keys - queries, query i sees keys i + shift - left ... i + shift + right, and causal is right = 0.
- `softmax_scale` None is 1 / sqrt(head_dim); `softcap` 0 is none; `alibi_slopes` are (heads,) or (batch, heads), for
  -slope * |i + shift - j|; `dropout_p` applies whenever it is > 0.
- With `return_attn_probs` the result is (out, softmax_lse, None): lse (batch, heads, length), packed (heads, total), float32,
  natural logarithm. There are no probabilities to return; flash-attn has none but with dropout, for its tests.
- `deterministic` is accepted: the backward is, always. `max_seqlen` is accepted and not looked at.

Other than there: all of tfkern's dtypes and head dims are taken, lse and alibi_slopes are differentiable, a query that sees no
key has an lse of -inf, and errors are tfkern.attention's, which call q, k and v query, key and value.

Source: the interface of flash-attn 2.8 (Dao, "FlashAttention-2", 2023).
"""

import torch
from torch import Tensor

from tfkern.functional import attention, attention_packed, attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """Attention of q (B, N, H, D), k (B, M, Hkv, D) and v (B, M, Hkv, Dv): (B, N, H, Dv). Raises as tfkern.attention."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = attention(q, k, v, enable_gqa=True, return_lse=return_attn_probs, **options)
    return (found[0].transpose(1, 2), found[1], None) if return_attn_probs else found.transpose(1, 2)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """flash_attn_func with keys and values in one tensor, kv (B, M, 2, Hkv, D)."""
    k, v = _pair(kv, "(B, M, 2, H, D)", 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """flash_attn_func with all three in one tensor, qkv (B, N, 3, H, D), whose gradient is one tensor as well."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _result(attention_packed(qkv, return_lse=return_attn_probs, **options), return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Result:  # fmt: skip
    """Attention of sequences that lie packed behind each other: q (total_q, H, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv),
    their starts in cu_seqlens (sequences + 1,), int32 or int64. block_table (paged keys) raises NotImplementedError."""
    if block_table is not None:
        raise NotImplementedError("block_table (paged keys and values) is not built yet; gather the pages into k and v")
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, enable_gqa=True, return_lse=return_attn_probs, **options)
    return _result(out, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """flash_attn_varlen_func with keys and values in one tensor, kv (total_k, 2, Hkv, D)."""
    k, v = _pair(kv, "(total, 2, H, D)", 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """flash_attn_varlen_func with all three in one tensor, qkv (total, 3, H, D), whose gradient is one tensor as well."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _result(attention_packed(qkv, cu_seqlens=cu_seqlens, return_lse=return_attn_probs, **options), return_attn_probs)


def _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes) -> dict:
    """Their arguments as ours."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), -1 meaning unbounded, but is {window_size!r}")
    return dict(
        dropout_p=dropout_p, scale=softmax_scale, is_causal=causal, causal_alignment="lower_right",
        window=tuple(map(side, window_size)), softcap=softcap or None, alibi_slopes=alibi_slopes,
    )  # fmt: skip


def side(n: int | None) -> int | None:
    """One side of a window as tfkern.attention takes it: any negative number is unbounded there."""
    return None if isinstance(n, (int, torch.SymInt)) and n < 0 else n


def _pair(kv: Tensor, dims: str, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values, views."""
    if not isinstance(kv, Tensor) or kv.dim() != count or kv.shape[-3] != 2:
        given = tuple(kv.shape) if isinstance(kv, Tensor) else type(kv).__name__
        raise ValueError(f"kv must have shape {dims}, keys before values, but is {given}; torch.stack((k, v), -3) makes one")
    return kv.unbind(-3)


def _result(found, return_attn_probs: bool) -> Result:
    return (*found, None) if return_attn_probs else found
