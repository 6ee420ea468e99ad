"""The functions users call."""

import torch
from torch import Tensor

from tfkern import autograd, backends
from tfkern.problem import Problem


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, causal_alignment: str = "upper_left",
    window: tuple[int | None, int | None] | None = None, key_lengths: Tensor | None = None, return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * Q K^T + mask) V, fused: the N x N scores are never stored, forward or backward.

    Args:
        query: (B, H, Nq, D), any strides; float16, bfloat16, float32, or float64 (backend eager only). Differentiable.
        key: (B, Hkv, Nk, D), dtype and device of query. Differentiable.
        value: (B, Hkv, Nk, Dv), dtype and device of query. Differentiable.
        attn_mask: not built yet; anything but None raises NotImplementedError.
        dropout_p: probability in [0, 1]; not built yet, more than 0 raises NotImplementedError.
        is_causal: query i sees only keys j <= i + shift.
        scale: factor of the scores, any finite number; None means 1 / sqrt(D).
        enable_gqa: lets H be a multiple of Hkv; query head h uses key head h // (H / Hkv).
        causal_alignment: where is_causal and window stand when Nq != Nk. "upper_left" (PyTorch's): shift = 0, the first query
            is aligned with the first key. "lower_right" (flash-attn's): shift = Nk - Nq, the last with the last.
        window: (left, right), integers >= 0 or None for unbounded: query i sees keys j with
            i + shift - left <= j <= i + shift + right. With is_causal, both hold.
        key_lengths: (B,) int32 or int64. Keys from key_lengths[b] on are not there in batch b: they are not read, their
            gradients are 0, and Nk in the shift is key_lengths[b]. On a GPU, values outside 0..Nk are clamped (a check would
            stop the stream).
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: "portable" or "eager"; None takes the first that can (`tfkern.explain` tells which).

    Returns:
        (B, H, Nq, Dv) in query's dtype and memory order. With return_lse also lse (B, H, Nq), float32 (float64 for float64),
        natural logarithm, differentiable. A query that sees no key gives 0, lse -inf, and zero gradients. (For 16-bit inputs,
        PyTorch's fused CPU attention, which the backend eager uses where it can, gives lse with errors of some 1e-5.)

    Under torch.autocast, inputs (but float64 ones) are converted to the autocast dtype first, as in PyTorch.
    The backward is deterministic. Second derivatives and forward-mode raise NotImplementedError.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range, named in the message.
        NotImplementedError: what is not built yet.
        tfkern.UnsupportedError: the backend named can't do this problem; the message says why.

    Source: Dao et al., "FlashAttention" (2022) and "FlashAttention-2" (2023); online softmax by Milakov and Gimelshein (2018).
    """
    query, key, value, problem = _prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, key_lengths
    )
    if key_lengths is not None:
        key_lengths = key_lengths.contiguous()
    out, lse = autograd.attention(query, key, value, key_lengths, problem, backends.choose(problem, backend))
    return (out, lse) if return_lse else out


def explain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    causal_alignment="upper_left", window=None, key_lengths=None, return_lse=False, backend=None,
) -> str:  # fmt: skip
    """Which backend `attention` would use for these arguments, and why not the ones before it. Computes nothing."""
    *_, problem = _prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, key_lengths
    )
    return backends.explain(problem, backend)


def _prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, key_lengths):
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask is not built yet; use is_causal, window or key_lengths, or PyTorch's own attention"
        )
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1], but is {dropout_p!r}")
    if dropout_p > 0.0:
        raise NotImplementedError(f"dropout_p = {dropout_p}: attention dropout is not built yet; pass 0.0")
    query, key, value = _autocast(query, key, value)
    problem = Problem.build(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, causal_alignment=causal_alignment,
        window=window, key_lengths=key_lengths,
    )  # fmt: skip
    return query, key, value, problem


def _autocast(*tensors):
    """The tensors in the autocast dtype where autocast is on for their device; what is no tensor is left for the checks."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )
