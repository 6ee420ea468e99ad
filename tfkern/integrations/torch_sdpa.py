"""PyTorch's scaled_dot_product_attention: its shapes, its broadcasting, its types of errors, around tfkern.attention."""

import math
import numbers
import sys

import torch
from torch import Tensor

from tfkern import call, checks, compat, tracing
from tfkern.functional import attention
from tfkern.integrations import sharded

PYTORCHS = compat.sdpa


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | Tensor | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.scaled_dot_product_attention, computed by tfkern: the same arguments, results, gradients and types
    of errors. `tfkern.attention` has more features and takes four dimensions.

    Args:
        query: (..., H, L, E) of two dimensions or more; float16, bfloat16, float32 or float64. What stands before L broadcasts
            with key's and value's. Or nested, layout torch.jagged, (B, H, ragged, E), as then are those. Differentiable.
        key: (..., H, S, E), dtype and device of query. Differentiable.
        value: (..., H, S, Ev). Differentiable.
        attn_mask: broadcasts to (..., H, L, S), which it doesn't enlarge. bool: True = attend. float32 or the dtype of query:
            added to the scores, differentiable. Or a torch.nn.attention.bias.CausalBias.
        dropout_p: probability in [0, 1] with which each weight is dropped whenever it is > 0; the bits are tfkern.attention's.
        is_causal: query i sees keys j <= i, whatever L and S. Not with attn_mask.
        scale: factor of the scores, a finite number or a tensor without dims that needs no grad; None means 1 / sqrt(E).
        enable_gqa: lets key and value have fewer heads (dim -3), each a number that divides query's.

    Under torch.autocast, inputs and float masks (but float64 ones) are first converted to the autocast dtype and may be mixed.

    Returns:
        (..., H, L, Ev) in query's dtype. It lies in memory in the order of query, as in PyTorch, where that has four dimensions
        (PyTorch's is contiguous for other numbers, and for Ev != E). Queries that see no key give 0, with zero gradients.

    Raises:
        TypeError: an argument of the wrong kind, such as an is_causal that isn't a bool.
        RuntimeError: shapes, dtypes, devices or a dropout_p that don't fit; attn_mask together with is_causal.
        NotImplementedError: complex or 8-bit inputs; derivatives that tfkern.attention hasn't.
        IndexError: enable_gqa without a dimension for heads.
        ValueError: CausalBias together with is_causal; scale not finite.

    Where PyTorch computes something from arguments that its documentation forbids, this raises: key and value of different
    lengths (it reads past the end), attn_mask together with is_causal, a negative dropout_p, a scale that isn't finite.

    PyTorch's own operator is called where something records operators of PyTorch (torch.fx.symbolic_trace, torch.jit.trace,
    make_fx, torch.onnx.export), and for tensors of classes with their own meaning of them. Of DTensors whose batch or heads
    are sharded, each rank attends to its part.

    Source: the documentation of PyTorch 2.13, and what it does.
    """
    biased = _is_causal_bias(attn_mask)
    if tracing.pytorchs(query, key, value, None if biased else attn_mask):
        given, options = (query, key, value, attn_mask, dropout_p, is_causal), dict(scale=scale, enable_gqa=enable_gqa)
        out = sharded.attention(scaled_dot_product_attention, *given, **options)
        return PYTORCHS(*given, **options) if out is None else out
    _types(query, key, value, attn_mask, is_causal, enable_gqa)
    dropout_p, scale = _number("dropout_p", dropout_p), None if scale is None else _number("scale", scale)
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(
            f"dropout probability has to be between 0 and 1, but got {dropout_p}; dropout_p must be a probability in [0, 1]"
        )
    alignment = "upper_left"
    if biased:
        alignment, is_causal, attn_mask = _alignment(attn_mask, query, key, is_causal), True, None
    elif is_causal and attn_mask is not None:
        raise RuntimeError(
            "Explicit attn_mask should not be set when is_causal=True; tfkern.attention takes both, or put the triangle into it"
        )
    more = dict(causal_alignment=alignment)
    if query.is_nested:
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **more)
    dtype = call.autocast_dtype(query)
    query, key, value, attn_mask = (call.cast(x, dtype) for x in (query, key, value, attn_mask))
    if _ordinary(query, key, value):
        batch, q, k, v = query.shape[:2], query, key, value
    else:  # PyTorch checks what comes with a lower-right CausalBias in Python
        _operands(query, key, value, RuntimeError if alignment == "upper_left" else ValueError)
        batch = _batch(query, key, value, enable_gqa)
        q, k, v = _folded(query, key, value, batch)
    if attn_mask is not None:
        attn_mask = _folded_mask(attn_mask, query, (*batch, query.shape[-2], key.shape[-2]))
    out = attention(q, k, v, attn_mask, dropout_p, is_causal, scale, not checks.same(k.shape[1:2], q.shape[1:2]), **more)
    return out if len(batch) == 2 else out.reshape(*batch, *out.shape[-2:])


def _types(query, key, value, attn_mask, is_causal, enable_gqa) -> None:
    """TypeError for what isn't a tensor or a flag."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(x, Tensor) and not (name == "attn_mask" and x is None):
            raise TypeError(f"{_argument(name)} must be Tensor, not {type(x).__name__}")
    for name, x in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(x, bool):
            raise TypeError(f"{_argument(name)} must be bool, not {type(x).__name__}; it is {x!r}, and is True or False")


def _argument(name: str) -> str:
    """As PyTorch's messages begin."""
    names = ("query", "key", "value", "attn_mask")
    position = f" (position {names.index(name) + 1})" if name in names else ""
    return f"scaled_dot_product_attention(): argument '{name}'{position}"


def _number(name: str, x) -> float | Tensor:
    """A number, or a tensor of one that a GPU has and nobody needs to wait for."""
    if isinstance(x, Tensor) and x.dim() == 0 and not x.requires_grad and not x.is_complex():
        kept = name == "scale" and x.is_floating_point() and not checks.readable(x)
        return x if kept else float(x)
    if not isinstance(x, numbers.Real):
        given = f"a tensor {tuple(x.shape)}, requires_grad={x.requires_grad}" if isinstance(x, Tensor) else repr(x)
        raise TypeError(
            f"{_argument(name)} must be float, not {type(x).__name__}: a number, or a tensor without dims that needs no grad, "
            f"but is {given}"
        )
    return float(x)


def _is_causal_bias(attn_mask) -> bool:
    module = sys.modules.get("torch.nn.attention.bias")  # whoever made one has imported it; it brings Dynamo, we don't
    return module is not None and isinstance(attn_mask, module.CausalBias)


def _alignment(bias, query: Tensor, key: Tensor, is_causal: bool) -> str:
    """Where the triangle of a CausalBias stands."""
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True; as attn_mask it tells where the triangle stands")
    # As PyTorch: the sizes of a bias that it wouldn't write out are not looked at, and where they are equal it is upper-left.
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:
        return "upper_left"
    declared = (bias.seq_len_q, bias.seq_len_kv)
    if not query.is_nested and min(query.dim(), key.dim()) > 1 and declared != (query.shape[-2], key.shape[-2]):
        wanted = (query.shape[-2], key.shape[-2])
        raise RuntimeError(f"attn_mask must be a CausalBias of the lengths of query and key, {wanted}, but is of {declared}")
    return "lower_right"


def _ordinary(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is nothing to fold and nothing wrong, as in most calls: to find out by less."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    (b, h, _, d), (b_k, h_k, n_k, d_k), (b_v, h_v, n_v, _) = query.shape, key.shape, value.shape
    fits = checks.same((b, b, h, h, d, n_k), (b_k, b_v, h_k, h_v, d_k, n_v), unknown=False)
    alike = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    return fits and alike and query.dtype in checks.DTYPES


def _operands(query: Tensor, key: Tensor, value: Tensor, error: type[Exception]) -> None:
    """The errors of PyTorch for tensors that don't fit each other, but for what broadcasts."""
    three = (query, key, value)
    named = tuple(zip(("query", "key", "value"), three, strict=True))
    if min(x.dim() for x in three) < 2:
        given = ", ".join(f"{name}.dim: {x.dim()}" for name, x in named)
        raise error(
            f"Expected query, key, and value to all be  at least 2 dimensional, but got {given} instead; they are (..., L, E)"
        )
    if any(x.dtype != query.dtype for x in three):
        given = ", ".join(f"{name}.dtype: {x.dtype}" for name, x in named)
        raise error(f"Expected query, key, and value to have the same dtype, but got {given} instead; convert with .to(dtype)")
    if any(x.device != query.device for x in three):
        given = ", ".join(f"{name}.device: {x.device}" for name, x in named)
        raise error(
            f"Expected query, key, and value to have the same device type, but got {given} instead; move with .to(device)"
        )
    if query.dtype not in checks.DTYPES:
        error = NotImplementedError if query.is_floating_point() or query.is_complex() else RuntimeError
        wanted = ", ".join(map(str, checks.DTYPES))
        raise error(f"query, key and value must be one of {wanted}, but are {query.dtype}; convert them with .to(dtype)")
    if not checks.same(key.shape[-1:], query.shape[-1:]):
        raise RuntimeError(f"key must have the head dim of query, {query.shape[-1]}, but has shape {tuple(key.shape)}")
    if not checks.same(value.shape[-2:-1], key.shape[-2:-1]):
        raise RuntimeError(f"value must have the length of key, {key.shape[-2]}, but has shape {tuple(value.shape)}")


def _batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """All of the result's shape but the last two: (..., H), or nothing."""
    shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if enable_gqa:
        if min(map(len, shapes)) < 1:
            raise IndexError(
                "query, key and value must have a dim of heads, (..., H, L, E), with enable_gqa=True, but have shapes "
                f"{[tuple(x.shape) for x in (query, key, value)]}"
            )
        heads = shapes[0][-1]
        if any(shape[-1] == 0 or heads % shape[-1] for shape in shapes[1:]):
            raise RuntimeError(
                f"Number of heads in key and value must divide the number of heads in query, {heads}, with enable_gqa=True, "
                f"but they have {shapes[1][-1]} and {shapes[2][-1]}"
            )
        shapes = [(*shape[:-1], heads) for shape in shapes]
    if all(checks.same(shape, shapes[0], unknown=False) for shape in shapes[1:]):
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise RuntimeError(
            "query, key and value must broadcast in all but their last two dims, but have shapes "
            f"{[tuple(x.shape) for x in (query, key, value)]}; enable_gqa=True lets key and value have fewer heads"
        ) from None


def _folded(query: Tensor, key: Tensor, value: Tensor, batch: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value as (B, H, N, D), of which the last two may have fewer heads, but as many as each other."""
    q, k, v = (_in_four(x, batch[:-1]) for x in (query, key, value))
    heads = batch[-1] if batch else 1
    if not checks.same(q.shape[1:2], (heads,)):
        q = q.expand(-1, heads, -1, -1)
    if not checks.same(k.shape[1:2], v.shape[1:2]) or checks.same((heads,), (0,), unknown=False):
        k, v = (_all_heads(x, heads) for x in (k, v))
    return q, k, v


def _all_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H, N, D) of (B, a divisor of H, N, D), each head repeated; a view where it has one."""
    if checks.same(x.shape[1:2], (heads,)):
        return x
    return x.expand(-1, heads, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], 1)


def _in_four(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """x (..., h, n, d) with all before h broadcast to `lead` and made one; a view, unless only some of it broadcasts."""
    batch = math.prod(lead)
    if x.dim() == 4 and len(lead) == 1 and checks.same(x.shape[:1], lead, unknown=False):
        return x
    x = x[(None,) * (len(lead) + 3 - x.dim())]
    if checks.same((math.prod(x.shape[:-3]),), (1,), unknown=False):
        return x.reshape(1, *x.shape[-3:]).expand(batch, -1, -1, -1)
    return x.expand(*lead, -1, -1, -1).reshape(batch, *x.shape[-3:])


def _folded_mask(mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask as tfkern.attention takes it, (B or 1, H or 1, L or 1, S or 1)."""
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: "
            f"{mask.dtype} and  query.dtype: {query.dtype} instead; convert it (bool: True = attend)"
        )
    if mask.device != query.device:
        raise RuntimeError(f"attn_mask must be on the device of query, {query.device}, but is on {mask.device}; move it")
    given = (1,) * (len(shape) - mask.dim()) + tuple(mask.shape)
    if len(given) > len(shape) or not checks.broadcasts(given, shape):
        raise RuntimeError(f"attn_mask must broadcast to {shape} = (..., L, S), but has shape {tuple(mask.shape)}")
    if len(shape) <= 4:
        return mask
    mask = mask.reshape(given)
    one = checks.same((math.prod(given[:-3]),), (1,), unknown=False)
    return mask.reshape(1, *given[-3:]) if one else _in_four(mask, shape[:-3])
