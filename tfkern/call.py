"""From the arguments of a public function to a Problem and its Tensors: every check, every view, and the random seed."""

import torch
from torch import Tensor

from tfkern import checks
from tfkern.problem import Problem, Tensors


def build(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    cu_seqlens_q=None, cu_seqlens_k=None, causal_alignment="upper_left", window=None, key_lengths=None, softcap=None,
    alibi_slopes=None, sinks=None, score_mod=None,
) -> tuple[Problem, Tensors]:  # fmt: skip
    """Check the arguments of tfkern.attention, or with cu_seqlens those of attention_varlen, and describe the call.

    Raises TypeError or ValueError. The seed of dropout is not drawn yet: the call may still fail.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    query, key, value, attn_mask, alibi_slopes, sinks = autocast(query, key, value, attn_mask, alibi_slopes, sinks)
    checks.operands(query, key, value, packed)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        checks.flag(name, flag)
    longest = None
    if packed:
        if key_lengths is not None:
            raise ValueError("key_lengths can't be given with cu_seqlens, which tell the lengths; drop one of them")
        checks.both_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
        checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], query.device)
        checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], query.device, len(cu_seqlens_q))
        batch = len(cu_seqlens_q) - 1
        if query.device.type == "cpu" and attn_mask is not None and batch:
            longest = (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    else:
        batch = query.shape[0]
    _, heads, n_q, head_dim = query.shape
    _, kv_heads, n_k, v_head_dim = value.shape
    checks.heads(heads, kv_heads, enable_gqa)
    if key_lengths is not None:
        checks.key_lengths(key_lengths, batch, n_k, query.device)
    checks.alignment(causal_alignment)
    left, right = checks.band(window, is_causal, n_q + n_k)
    scale = checks.scale(scale, head_dim, query)
    dropout_p = checks.dropout_p(dropout_p)
    if attn_mask is not None:
        checks.mask(attn_mask, query, (batch, heads, n_q, n_k), packed, longest)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if alibi_slopes is not None:
        checks.slopes(alibi_slopes, query, batch, heads)
        alibi_slopes = alibi_slopes[None] if alibi_slopes.dim() == 1 else alibi_slopes
    if sinks is not None:
        checks.sinks(sinks, query, heads)
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    mask, bias = (attn_mask, None) if is_bool else (None, attn_mask)
    number, scale = _scale(scale, query)
    problem = Problem(
        batch, heads, kv_heads, n_q, n_k, head_dim, v_head_dim, query.dtype, query.device, number,
        left, right, causal_alignment == "lower_right", packed, key_lengths is not None,
        None if mask is None else tuple(mask.shape), None if bias is None else tuple(bias.shape),
        dropout_p, checks.softcap(softcap), alibi_slopes is not None, sinks is not None, checks.score_mod(score_mod),
    )  # fmt: skip
    return problem, Tensors(
        query, key, value, bias, alibi_slopes, _contiguous(sinks), mask,
        *map(_contiguous, (key_lengths, cu_seqlens_q, cu_seqlens_k)), None, scale,
    )  # fmt: skip


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v (B, H, N, D) of qkv (B, N, 3, H, D), or (1, H, total, D) of (total, 3, H, D)."""
    if qkv.dim() == 4:
        qkv = qkv.unsqueeze(0)
    return tuple(qkv.permute(2, 0, 3, 1, 4))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _scale(scale, query: Tensor) -> tuple[float | None, Tensor | None]:
    """(number, tensor), one of them None. A tensor in the CPU's memory is a number to any other device."""
    if not isinstance(scale, Tensor):
        return scale, None
    if scale.device != query.device:
        return float(scale), None
    return None, scale.reshape(()).to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def autocast(*tensors):
    """Floating-point tensors in the autocast dtype where autocast is on for their device; the rest is left for the checks."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    if isinstance(tensors[0], Tensor) and tensors[0].dtype == torch.float64:
        return tensors
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )
