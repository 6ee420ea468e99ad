"""From the arguments of a public function to a Problem and its Tensors: every check, every view, and the random seed."""

import torch
from torch import Tensor

from tfkern import checks
from tfkern.problem import Problem, Tensors, lse_dtype

# What a call is, by all that its checks look at, so that the next call like it needs none of them.
_problems: dict[tuple, Problem] = {}
MANY_PROBLEMS = 4096
# Types of devices that have autocast. (Asked here, as Dynamo can't ask before PyTorch 2.12.)
AUTOCAST = frozenset(x for x in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(x))


def build(*args, **kwargs) -> tuple[Problem, Tensors]:
    """Check the arguments of tfkern.attention, or with cu_seqlens those of attention_varlen, and describe the call.

    Raises TypeError or ValueError. The seed of dropout is not drawn yet: the call may still fail.
    """
    return prepare(*given(*args, **kwargs))


def given(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    cu_seqlens_q=None, cu_seqlens_k=None, causal_alignment="upper_left", window=None, key_lengths=None, softcap=None,
    alibi_slopes=None, sinks=None, score_mod=None, precise_delta=False,
) -> tuple[tuple, tuple]:  # fmt: skip
    """(tensors, options) as describe takes them."""
    return (
        (query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k),
        (dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap, score_mod, precise_delta),
    )


def prepare(tensors: tuple, options: tuple) -> tuple[Problem, Tensors]:
    """build, of what describe takes, before autocast."""
    tensors = autocast(*tensors[:6]) + tensors[6:]
    packed = tensors[7] is not None or tensors[8] is not None
    return describe(tensors, options), collect(packed, *tensors, options[2])


def describe(tensors: tuple, options: tuple) -> Problem:
    """The problem of (query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k) and
    (dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap, score_mod, precise_delta); every check, or a
    look into what is known of the same call."""
    signature = _signature(tensors, options)
    problem = None if signature is None else _problems.get(signature)
    if problem is None:
        problem = _describe(*tensors, *options)
        if signature is not None:
            if len(_problems) >= MANY_PROBLEMS:
                _problems.clear()
            _problems[signature] = problem
    elif tensors[6:] != (None, None, None):
        _values(*tensors[:2], *tensors[6:])
    return problem


def _values(query: Tensor, key: Tensor, key_lengths, cu_seqlens_q, cu_seqlens_k) -> None:
    """The checks that look at values: those of every call, however well it is known."""
    if key_lengths is not None:
        checks.key_lengths_values(key_lengths, key.shape[2])
    if cu_seqlens_q is not None:
        checks.cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, query.shape[0])
        checks.cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, key.shape[0])


def _signature(tensors: tuple, options: tuple) -> tuple | None:
    """All that the checks look at but values of lengths, or None where they look at other values, or can't be kept."""
    try:
        if isinstance(options[2], Tensor) or (tensors[3] is not None and tensors[7] is not None):
            return None  # a scale; what a mask must have for the longest of packed sequences
        scale, window = options[2], options[5]
        sides = window if isinstance(window, tuple) else ()
        signature = (
            *[None if x is None else (x.shape, x.dtype, x.device) for x in tensors], options,
            *[x.__class__ for x in (*options, *sides)],  # 1 and 1.0 and True are equal, and not all are welcome
            scale or str(scale),  # 0.0 and -0.0 are equal, and a score_mod may tell them apart
        )  # fmt: skip
        hash(signature)
    except (AttributeError, TypeError):  # not tensors, or a list among the options: the checks will tell
        return None
    return signature


def _describe(
    query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k,
    dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap, score_mod, precise_delta,
) -> Problem:  # fmt: skip
    """Every check, and what is to be computed."""
    batch, heads, kv_heads, n_q, n_k, head_dim, v_head_dim = fit(
        query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, enable_gqa
    )
    checks.flag("is_causal", is_causal)
    checks.flag("precise_delta", precise_delta)
    checks.alignment(causal_alignment)
    left, right = checks.band(window, is_causal, n_q + n_k)
    scale = _number(checks.scale(scale, head_dim, query), query)
    dropout_p = checks.dropout_p(dropout_p)
    mask, bias = None, None
    if attn_mask is not None:
        shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        mask, bias = (shape, None) if attn_mask.dtype == torch.bool else (None, shape)
    return Problem(
        batch, heads, kv_heads, n_q, n_k, head_dim, v_head_dim, query.dtype, query.device, scale, left, right,
        causal_alignment == "lower_right", cu_seqlens_q is not None, key_lengths is not None, mask, bias, dropout_p,
        checks.softcap(softcap), alibi_slopes is not None, sinks is not None, checks.score_mod(score_mod),
        precise_delta,
    )  # fmt: skip


def fit(
    query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, enable_gqa
) -> tuple[int, ...]:
    """The checks of the tensors. Returns (batch, heads, kv_heads, n_q, n_k, head_dim, v_head_dim), symbols where torch.compile
    has symbols."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    checks.operands(query, key, value, packed)
    checks.flag("enable_gqa", enable_gqa)
    longest = None
    if packed:
        if key_lengths is not None:
            raise ValueError("key_lengths can't be given with cu_seqlens, which tell the lengths; drop one of them")
        checks.both_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
        checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], query.device)
        checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], query.device, cu_seqlens_q.shape[0])
        batch = cu_seqlens_q.shape[0] - 1
        if attn_mask is not None and checks.readable(cu_seqlens_q) and batch:
            longest = (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    else:
        batch = query.shape[0]
    heads, n_q, head_dim = _sizes(query, packed)
    kv_heads, n_k, v_head_dim = _sizes(value, packed)
    checks.heads(heads, kv_heads, enable_gqa)
    if key_lengths is not None:
        checks.key_lengths(key_lengths, batch, n_k, query.device)
    if attn_mask is not None:
        checks.mask(attn_mask, query, (batch, heads, n_q, n_k), packed, longest)
    if alibi_slopes is not None:
        checks.slopes(alibi_slopes, query, batch, heads)
    if sinks is not None:
        checks.sinks(sinks, query, heads)
    return batch, heads, kv_heads, n_q, n_k, head_dim, v_head_dim


def collect(packed: bool, query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_q, cu_k, scale) -> Tensors:
    """The tensors of a call, as views of the shapes that backends want."""
    if packed:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    mask, bias = None, None
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    if alibi_slopes is not None and alibi_slopes.dim() == 1:
        alibi_slopes = alibi_slopes[None]
    return Tensors(
        query, key, value, bias, alibi_slopes, _contiguous(sinks), mask, _contiguous(key_lengths), _contiguous(cu_q),
        _contiguous(cu_k), None, on_device(scale, query),
    )  # fmt: skip


def on_device(scale, query: Tensor) -> Tensor | None:
    """A scale that only the device of query knows, as backends want it; None where it is, or can be, a number."""
    if not isinstance(scale, Tensor) or scale.device != query.device:
        return None
    return scale.reshape(()).to(lse_dtype(query.dtype))


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v (B, H, N, D) of qkv (B, N, 3, H, D), or (1, H, total, D) of (total, 3, H, D)."""
    if qkv.dim() == 4:
        qkv = qkv.unsqueeze(0)
    return tuple(qkv.permute(2, 0, 3, 1, 4))


def unpacked(t: Tensors) -> Tensors:
    """The tensors with q, k and v, where q was the packed qkv."""
    if t.k is not None:
        return t
    q, k, v = unpack(t.q)
    return t._replace(q=q, k=k, v=v)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _sizes(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """(heads, rows, head dim) of (B, H, N, D), or of packed (total, H, D)."""
    if packed:
        rows, heads, dim = x.shape
    else:
        _, heads, rows, dim = x.shape
    return heads, rows, dim


def _number(scale, query: Tensor) -> float | None:
    """A scale as a number, None if only its own device knows it. One in the CPU's memory is a number to any other device."""
    if isinstance(scale, Tensor):
        return None if scale.device == query.device else float(scale)
    return scale


def autocast(*tensors):
    """Floating-point tensors in the autocast dtype where autocast is on for their device; the rest is left for the checks."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if kind not in AUTOCAST or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    if isinstance(tensors[0], Tensor) and tensors[0].dtype == torch.float64:
        return tensors
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )
