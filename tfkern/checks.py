"""The checks of the arguments of attention. A message names the argument, what it must be, what it is, and what to do."""

import inspect
import math
import numbers

import torch
from torch import Tensor

from tfkern import compat

ALIGNMENTS = ("upper_left", "lower_right")
LARGEST = torch.finfo(torch.float32).max  # kernels compute in float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def same(given, wanted, unknown: bool = True) -> bool:
    """Whether sizes are equal. Where torch.compile can't know, because a size depends on data, the answer is `unknown`: True is
    right for what an op checks again when it runs."""
    if not (torch.compiler.is_compiling() or torch.SymInt in map(type, (*given, *wanted))):
        return tuple(given) == tuple(wanted)
    return len(given) == len(wanted) and all(compat.guard_or(unknown, g == w) for g, w in zip(given, wanted, strict=True))


def operands(query, key, value, packed: bool) -> None:
    """query, key and value are tensors of the right number of dims, and their shapes, dtypes and devices fit together."""
    dims = "(total, heads, head_dim)" if packed else "(batch, heads, length, head_dim)"
    for name, x in (("query", query), ("key", key), ("value", value)):
        _tensor(name, x)
        if x.dim() != (3 if packed else 4):
            raise ValueError(
                f"{name} must have {3 if packed else 4} dimensions {dims}, but has shape {tuple(x.shape)}; "
                "add the missing ones with unsqueeze"
            )
    dtype("query", query)
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, but is {x.dtype}; convert one of them")
        _device(name, x, query.device)
        if not packed and not same(x.shape[:1], query.shape[:1]):
            raise ValueError(
                f"{name} must have the batch size of query, {query.shape[0]}, but has shape {tuple(x.shape)}; "
                "repeat it with .expand, which copies nothing"
            )
    if not same(key.shape[-1:], query.shape[-1:]):
        raise ValueError(f"key must have the head dim of query, {query.shape[-1]}, but has shape {tuple(key.shape)}")
    if not same(value.shape[:-1], key.shape[:-1]):
        at = "length and the heads" if packed else "heads and the length"
        wanted = tuple(key.shape[:-1]) if packed else tuple(key.shape[1:3])
        raise ValueError(f"value must have the {at} of key, {wanted}, but has shape {tuple(value.shape)}")


def dtype(name: str, x: Tensor) -> None:
    """x has a dtype that attention supports."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, but is {x.dtype}; convert it with .to(dtype)")


def packed_qkv(qkv, varlen: bool) -> None:
    """qkv is (B, N, 3, H, D), with cu_seqlens (total, 3, H, D)."""
    _tensor("qkv", qkv)
    wanted, dims = ("(total, 3, H, D)", 4) if varlen else ("(B, N, 3, H, D)", 5)
    if qkv.dim() != dims or qkv.shape[-3] != 3:
        other = "without" if varlen else "with"
        raise ValueError(
            f"qkv must have shape {wanted}, but has {tuple(qkv.shape)}; .unflatten(-1, (3, H, D)) gives it to a projection's "
            f"output; {other} cu_seqlens the other form is wanted"
        )
    dtype("qkv", qkv)


def heads(heads: int, kv_heads: int, enable_gqa: bool) -> None:
    """The numbers of heads are equal, or with enable_gqa those of query are a multiple."""
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


def key_lengths(key_lengths, batch: int, n_k: int, device: torch.device) -> None:
    """key_lengths is (batch,) integers in 0..n_k."""
    _integers("key_lengths", key_lengths, batch, "one length a batch", device)
    key_lengths_values(key_lengths, n_k)


def key_lengths_values(key_lengths: Tensor, n_k: int) -> None:
    """The values are in 0..n_k. Where they can't be read, the kernels clamp them to that range."""
    if readable(key_lengths) and key_lengths.numel():
        values = key_lengths.tolist()
        if not (min(values) >= 0 and max(values) <= n_k):
            raise ValueError(f"key_lengths must lie in 0..{n_k}, the length of key, but are {values}")


def cu_seqlens(name: str, cu, total: int, device: torch.device, count: int | None = None) -> None:
    """cu is (B + 1,) integers that rise from 0 to at most total. `count` is the wanted B + 1, None: any."""
    if isinstance(cu, Tensor) and (cu.dim() != 1 or same(cu.shape, (0,), unknown=False)):
        raise ValueError(f"{name} must have shape (sequences + 1,), starting with 0, but has {tuple(cu.shape)}")
    _integers(name, cu, count, "as cu_seqlens_q has", device)
    cu_seqlens_values(name, cu, total)


def cu_seqlens_values(name: str, cu: Tensor, total: int) -> None:
    """The values rise from 0 to at most total."""
    if not readable(cu):
        return  # whatever the values are, the kernels stay inside the tensors
    values = cu.tolist()
    if values[0] != 0 or values != sorted(values) or values[-1] > total:
        raise ValueError(f"{name} must rise from 0 to at most {total}, the rows that there are, but is {values}")


def mask(attn_mask, query: Tensor, shape: tuple[int, int, int, int], packed: bool, longest: tuple[int, int] | None) -> None:
    """attn_mask broadcasts to shape (B, H, Nq, Nk). Packed: to (B, H), and its last dims are 1 or at least `longest`, the
    lengths of the longest sequences of queries and of keys, where those are known."""
    _tensor("attn_mask", attn_mask)
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask must be bool (True = attend), torch.float32 or the dtype of query, {query.dtype}, but is "
            f"{attn_mask.dtype}; convert it"
        )
    _device("attn_mask", attn_mask, query.device)
    given = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    fits = attn_mask.dim() <= 4 and broadcasts(given[:2], shape[:2])
    if packed:
        if longest is not None:
            fits = fits and all(g == 1 or g >= n for g, n in zip(given[2:], longest, strict=True))
        wanted = f"{shape[:2]} and at least the longest sequence of queries and of keys" + (f", {longest}" if longest else "")
    else:
        fits = fits and broadcasts(given[2:], shape[2:])
        wanted = f"{shape} = (B, H, Nq, Nk)"
    if not fits:
        raise ValueError(f"attn_mask must broadcast to {wanted}, but has shape {tuple(attn_mask.shape)}")


def broadcasts(given: tuple, shape: tuple) -> bool:
    return all(same((g,), (s,)) or g == 1 for g, s in zip(given, shape, strict=True))


def slopes(alibi_slopes, query: Tensor, batch: int, heads: int) -> None:
    """alibi_slopes is (H,) or (B, H), float32 or the dtype of query."""
    _vector("alibi_slopes", alibi_slopes, query, [(heads,), (batch, heads)])


def sinks(sinks, query: Tensor, heads: int) -> None:
    """sinks is (H,), float32 or the dtype of query."""
    _vector("sinks", sinks, query, [(heads,)])


def softcap(softcap) -> float | None:
    """softcap as a float: a finite number above 0. None stays None."""
    if softcap is None:
        return None
    _number("softcap", softcap, "a number above 0, or None")
    if not 0 < softcap <= LARGEST:
        raise ValueError(f"softcap must be a number above 0 and at most {LARGEST:.1e}, or None for no cap, but is {softcap}")
    return float(softcap)


def dropout_p(dropout_p) -> float:
    """dropout_p as a float: a number in [0, 1]."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1], but is {dropout_p!r}")
    return float(dropout_p)


def score_mod(score_mod) -> tuple | None:
    """score_mod as a tuple of two @triton.jit functions of five parameters. None stays None."""
    if score_mod is None:
        return None
    pair = isinstance(score_mod, (tuple, list)) and len(score_mod) == 2
    if not pair or not all(hasattr(f, "fn") and len(inspect.signature(f.fn).parameters) == 5 for f in score_mod):
        raise TypeError(
            "score_mod must be a pair (value, derivative) of @triton.jit functions of (score, b, h, i, j), but is "
            f"{score_mod!r}"
        )
    return tuple(score_mod)


def scale(scale, head_dim: int, query: Tensor) -> float | Tensor:
    """scale as a finite float, or a tensor of one number that requires no grad. None becomes 1 / sqrt(head_dim)."""
    if scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    if not isinstance(scale, Tensor):
        _number("scale", scale, "a number, a tensor of one, or None (1 / sqrt(head_dim))")
        if not -LARGEST <= scale <= LARGEST:
            raise ValueError(f"scale must be finite, at most {LARGEST:.1e}, but is {scale}")
        return float(scale)
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(f"scale must be a tensor of one floating-point number, but is {scale.dtype} {tuple(scale.shape)}")
    if scale.requires_grad:
        raise ValueError("scale must not require grad, it gets no gradient; multiply query by it instead, or detach it")
    if scale.device.type != "cpu":
        _device("scale", scale, query.device)
    elif readable(scale) and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, but is {float(scale)}")
    return scale


def shapes_only(x: Tensor) -> bool:
    """Whether x has a shape but no values: on the device meta, or in a FakeTensorMode."""
    return x.is_meta or compat.fake(x)


def readable(x: Tensor) -> bool:
    """Whether the values of x can be read. On a GPU that would stop the stream; under torch.compile and vmap there are none."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return compat.has_values(x)


def flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r}")


def both_cu_seqlens(cu_q, cu_k) -> None:
    for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if x is None:
            raise TypeError(f"{name} must be a tensor of integers, as the other is given, but is None")


def alignment(causal_alignment) -> None:
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {ALIGNMENTS}, but is {causal_alignment!r}")


def band(window, is_causal: bool, unbounded: int) -> tuple[int | None, int | None]:
    """(left, right) of window and is_causal together. A side of `unbounded` or more hides nothing and is cut to that number."""
    left, right = sides(window)
    if is_causal:
        right = 0
    return tuple(None if side is None else min(side, unbounded) for side in (left, right))


def sides(window) -> tuple[int | None, int | None]:
    """(left, right) of window, each an int >= 0 or None."""
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


def _tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is {type(x).__name__}")


def _device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, but is on {x.device}; move one of them")


def _number(name: str, x, wanted: str) -> None:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be {wanted}, but is {x!r}")


def _integers(name: str, x, count: int | None, what: str, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        # Only here: torch.compile makes a constant of a symbol that is formatted.
        number = "" if count is None else f"{count} "
        raise TypeError(f"{name} must be a tensor of {number}integers, but is {type(x).__name__}; torch.tensor(…) makes one")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, but is {x.dtype}")
    if count is not None and not same(x.shape, (count,)):
        raise ValueError(f"{name} must have shape ({count},), {what}, but has {tuple(x.shape)}")
    _device(name, x, device)


def _vector(name: str, x, query: Tensor, shapes: list[tuple[int, ...]]) -> None:
    _tensor(name, x)
    if x.dtype not in (torch.float32, query.dtype):
        raise TypeError(f"{name} must be torch.float32 or the dtype of query, {query.dtype}, but is {x.dtype}; convert it")
    if not any(same(x.shape, shape) for shape in shapes):
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, but has {tuple(x.shape)}")
    _device(name, x, query.device)
