"""From the arguments of a public function to a Problem and its Tensors: every check and every view."""

from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import checks
from tfkern.options import Inputs, Options
from tfkern.problem import Problem, Tensors, lse_dtype

# Memo of describe: call signature -> Problem. A repeated call skips all checks but those of values.
_problems: dict[tuple, Problem] = {}
MANY_PROBLEMS = 4096
# Device types with autocast. Filled at import, because Dynamo can't trace the question before PyTorch 2.12.
AUTOCAST = frozenset(x for x in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(x))


def build(*args, **kwargs) -> tuple[Problem, Tensors]:
    """The Problem and the Tensors of a call, from arguments as `given` takes them.

    Raises TypeError or ValueError, as tfkern.attention. The seed of dropout is not drawn: the call may still be refused.
    """
    return prepare(*given(*args, **kwargs))


def given(query, key, value, attn_mask=None, *options, **named) -> tuple[Inputs, Options]:
    """The arguments of tfkern.attention, or with cu_seqlens by name those of tfkern.attention_varlen, as Inputs and Options."""
    if len(options) > Options._fields.index("causal_alignment"):
        raise TypeError("arguments behind enable_gqa are passed by name, as to tfkern.attention")
    tensors = {name: named.pop(name) for name in Inputs._fields if name in named}
    return Inputs(query, key, value, attn_mask, **tensors), Options(*options, **named)


def prepare(inputs: Inputs, options: Options) -> tuple[Problem, Tensors]:
    """The Problem and the Tensors of a call, after autocast."""
    inputs = autocast(inputs)
    problem = describe(inputs, options)
    if problem.plain:  # nothing but query, key and value, which are views as they are
        return problem, Tensors(inputs.query, inputs.key, inputs.value)
    return problem, views(inputs, options.scale)


def describe(inputs: Inputs, options: Options) -> Problem:
    """The Problem of a call, checked, or taken from the memo."""
    signature = _signature(inputs, options)
    try:
        problem = _problems.get(signature)
    except TypeError:  # not hashable: a list among the options, which the checks refuse or convert
        return _problem(inputs, options)
    if problem is None:
        problem = _problem(inputs, options)
        if signature is not None:
            if len(_problems) >= MANY_PROBLEMS:
                _problems.clear()
            _problems[signature] = problem
    elif problem.has_key_lengths or problem.packed:
        _check_values(inputs)
    return problem


def _check_values(inputs: Inputs) -> None:
    """The checks of values, which the memo can't replace."""
    if inputs.key_lengths is not None:
        checks.key_lengths_values(inputs.key_lengths, inputs.key.shape[2])
    if inputs.cu_seqlens_q is not None:
        checks.cu_seqlens_values("cu_seqlens_q", inputs.cu_seqlens_q, inputs.query.shape[0])
        checks.cu_seqlens_values("cu_seqlens_k", inputs.cu_seqlens_k, inputs.key.shape[0])


def _signature(inputs: Inputs, options: Options) -> tuple | None:
    """All that a Problem depends on, or None where the checks depend on values: those of a scale that is a tensor, and of the
    cu_seqlens that a mask must fit."""
    scale, window = options.scale, options.window
    if isinstance(scale, Tensor) or (inputs.attn_mask is not None and inputs.cu_seqlens_q is not None):
        return None
    try:
        described = [None if x is None else (x.shape, x.dtype, x.device) for x in inputs]
    except AttributeError:  # not a tensor, which the checks refuse
        return None
    # The types, because True == 1 == 1.0 and not each is valid. The text of a zero scale, because 0.0 == -0.0 and a score_mod
    # may tell them apart.
    sides = map(type, window) if isinstance(window, tuple) else ()
    return *described, options, *map(type, options), *sides, scale or str(scale)


def _problem(inputs: Inputs, options: Options) -> Problem:
    """The Problem of a call, after every check."""
    sizes = fit(inputs, options.enable_gqa)
    query, mask = inputs.query, inputs.attn_mask
    checks.flag("is_causal", options.is_causal)
    checks.flag("precise_delta", options.precise_delta)
    checks.alignment(options.causal_alignment)
    left, right = checks.band(options.window, options.is_causal, sizes.n_q + sizes.n_k)
    mask_shape = None if mask is None else (1,) * (4 - mask.dim()) + tuple(mask.shape)
    boolean = mask is not None and mask.dtype == torch.bool
    return Problem(
        **sizes._asdict(),
        dtype=query.dtype,
        device=query.device,
        scale=_number(checks.scale(options.scale, sizes.head_dim, query), query),
        left=left,
        right=right,
        lower_right=options.causal_alignment == "lower_right",
        packed=inputs.cu_seqlens_q is not None,
        has_key_lengths=inputs.key_lengths is not None,
        mask=mask_shape if boolean else None,
        bias=None if boolean else mask_shape,
        dropout_p=checks.dropout_p(options.dropout_p),
        softcap=checks.softcap(options.softcap),
        has_slopes=inputs.alibi_slopes is not None,
        has_sinks=inputs.sinks is not None,
        score_mod=checks.score_mod(options.score_mod),
        precise_delta=options.precise_delta,
    )


class Sizes(NamedTuple):
    """The sizes of a Problem; symbols where torch.compile has symbols."""

    batch: int
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    head_dim: int
    v_head_dim: int


def fit(inputs: Inputs, enable_gqa: bool) -> Sizes:
    """The sizes of a call, after the checks of its tensors."""
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.attn_mask
    cu_q, cu_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    packed = cu_q is not None or cu_k is not None
    checks.operands(query, key, value, packed)
    checks.flag("enable_gqa", enable_gqa)
    longest = None
    if packed:
        if inputs.key_lengths is not None:
            raise ValueError("key_lengths can't be given with cu_seqlens, which tell the lengths; drop one of them")
        checks.both_cu_seqlens(cu_q, cu_k)
        checks.cu_seqlens("cu_seqlens_q", cu_q, query.shape[0], query.device)
        checks.cu_seqlens("cu_seqlens_k", cu_k, key.shape[0], query.device, cu_q.shape[0])
        batch = cu_q.shape[0] - 1
        if mask is not None and checks.readable(cu_q) and batch:
            longest = (int(cu_q.diff().max()), int(cu_k.diff().max()))
    else:
        batch = query.shape[0]
    heads, n_q, head_dim = _rows(query, packed)
    kv_heads, n_k, v_head_dim = _rows(value, packed)
    checks.heads(heads, kv_heads, enable_gqa)
    if inputs.key_lengths is not None:
        checks.key_lengths(inputs.key_lengths, batch, n_k, query.device)
    if mask is not None:
        checks.mask(mask, query, (batch, heads, n_q, n_k), packed, longest)
    if inputs.alibi_slopes is not None:
        checks.slopes(inputs.alibi_slopes, query, batch, heads)
    if inputs.sinks is not None:
        checks.sinks(inputs.sinks, query, heads)
    return Sizes(batch, heads, kv_heads, n_q, n_k, head_dim, v_head_dim)


def _rows(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """(heads, rows, head dim) of x (B, H, N, D), or packed (total, H, D)."""
    if packed:
        rows, heads, dim = x.shape
    else:
        _, heads, rows, dim = x.shape
    return heads, rows, dim


def views(inputs: Inputs, scale) -> Tensors:
    """The tensors of a checked call in the shapes that backends take. Only small vectors are copied, if they are strided."""
    query, key, value, mask, slopes = inputs.query, inputs.key, inputs.value, inputs.attn_mask, inputs.alibi_slopes
    if inputs.cu_seqlens_q is not None:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    boolean = mask is not None and mask.dtype == torch.bool
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes[None]
    return Tensors(
        query,
        key,
        value,
        bias=None if boolean else mask,
        slopes=slopes,
        sinks=_contiguous(inputs.sinks),
        mask=mask if boolean else None,
        key_lengths=_contiguous(inputs.key_lengths),
        cu_q=_contiguous(inputs.cu_seqlens_q),
        cu_k=_contiguous(inputs.cu_seqlens_k),
        scale=on_device(scale, query),
    )


def on_device(scale, query: Tensor) -> Tensor | None:
    """A scale whose value only the device of query knows, in the form that backends take. None: it is, or becomes, a number."""
    if not isinstance(scale, Tensor) or scale.device != query.device:
        return None
    return scale.reshape(()).to(lse_dtype(query.dtype))


def _number(scale, query: Tensor) -> float | None:
    """A checked scale as a number. None: only the device of query knows its value."""
    if isinstance(scale, Tensor):
        return None if scale.device == query.device else float(scale)
    return scale


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v (B, H, N, D) of qkv (B, N, 3, H, D), or (1, H, total, D) of (total, 3, H, D)."""
    if qkv.dim() == 4:
        qkv = qkv.unsqueeze(0)
    return tuple(qkv.permute(2, 0, 3, 1, 4))


def unpacked(t: Tensors) -> Tensors:
    """The tensors with views q, k and v, if t.q is the packed qkv and k is None."""
    if t.k is not None:
        return t
    q, k, v = unpack(t.q)
    return t._replace(q=q, k=k, v=v)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def autocast(inputs: Inputs) -> Inputs:
    """The tensors of a call as autocast converts them."""
    dtype = autocast_dtype(inputs.query)
    if dtype is None:
        return inputs
    return inputs._replace(
        query=cast(inputs.query, dtype),
        key=cast(inputs.key, dtype),
        value=cast(inputs.value, dtype),
        attn_mask=cast(inputs.attn_mask, dtype),
        alibi_slopes=cast(inputs.alibi_slopes, dtype),
        sinks=cast(inputs.sinks, dtype),
    )


def autocast_dtype(query) -> torch.dtype | None:
    """The dtype to which autocast converts the tensors of a call. None: autocast is off for query's device, or query is
    float64."""
    kind = query.device.type if isinstance(query, Tensor) else "cpu"
    if kind not in AUTOCAST or not torch.is_autocast_enabled(kind):
        return None
    if isinstance(query, Tensor) and query.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def cast(x, dtype: torch.dtype | None):
    """x in dtype, if it is a floating-point tensor but not float64. Anything else is returned as it is, for the checks."""
    if dtype is None or not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(dtype)
