"""The functions users call."""

from collections.abc import Callable

import torch
from torch import Tensor

from tfkern import autograd, backends, call, checks, dropout, nested, ops, tracing
from tfkern.dynamo import uncompiled
from tfkern.options import Inputs, Options
from tfkern.problem import lse_of

Pair = tuple[Callable, Callable]  # tfkern.ScoreMod is one


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | Tensor | None = None, enable_gqa: bool = False, *,
    causal_alignment: str = "upper_left", window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None, softcap: float | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, score_mod: Pair | None = None, precise_delta: bool = False,
    return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * Q K^T + mask) V, fused: neither forward nor backward stores the N x N scores.

    All arguments can be combined. docs/features.md has the formula, the gradient and an example of each.

    Args:
        query: (B, H, Nq, D), any strides; float16, bfloat16, float32, or float64 (backends cpu and eager). Or a nested tensor
            (B, H, ragged, D) of layout torch.jagged; then key, value and the result are nested too. Differentiable.
        key: (B, Hkv, Nk, D), dtype and device of query. Differentiable.
        value: (B, Hkv, Nk, Dv), dtype and device of query. Differentiable.
        attn_mask: broadcasts to (B, H, Nq, Nk), read in place. bool: True = attend. float32 or the dtype of query: added to the
            scores (-inf hides), differentiable, its gradient summed over what it broadcasts along.
        dropout_p: probability in [0, 1], in steps of 1/65536, that a softmax weight is dropped; the others are scaled up.
            There is no training flag: any dropout_p > 0 drops. Random bits come from torch's generator of the device.
        is_causal: query i sees only keys j <= i + shift.
        scale: factor of the scores: any finite number, or a tensor of one that needs no grad; None means 1 / sqrt(D).
        enable_gqa: lets H be a multiple of Hkv; query head h uses key head h // (H / Hkv).
        causal_alignment: the shift of is_causal, window and alibi_slopes if Nq != Nk. "upper_left" (PyTorch's): shift = 0, the
            first query is aligned with the first key. "lower_right" (flash-attn's): shift = Nk - Nq, the last with the last.
        window: (left, right), integers >= 0 or None for unbounded: query i sees keys j with
            i + shift - left <= j <= i + shift + right. With is_causal, both hold.
        key_lengths: (B,) int32 or int64. Batch b has the keys before key_lengths[b] only. Later keys are not read, their
            gradients are 0, and Nk in the shift is key_lengths[b]. On a GPU, values outside 0..Nk are clamped (a check would
            stop the stream).
        softcap: c > 0: scores s become c * tanh(s / c), before everything that is added.
        alibi_slopes: (H,) or (B, H), float32 or the dtype of query: -slope * |i + shift - j| is added. Differentiable.
        sinks: (H,), float32 or the dtype of query: one more logit per head in the softmax's denominator. Differentiable.
        score_mod: (value, derivative), two @triton.jit functions of (score, b, h, i, j): value replaces the scaled and capped
            score before ALiBi and attn_mask, derivative is d value / d score. torch.compile on a GPU wants a tfkern.ScoreMod.
        precise_delta: for 16-bit inputs, the backward computes delta = rowsum(O * dO) from an O that is not rounded. For that
            the forward saves 2 more bytes for each element of O.
        return_lse: also return the log-sum-exp of the logits, the sink among them.
        backend: "hopper", "portable", "cpu" or "eager". None: the first that supports the call, and its backward if a tensor
            requires grad (`tfkern.explain` tells which); "hopper" only if TFKERN_BACKENDS names it.

    Returns:
        (B, H, Nq, Dv) in query's dtype and memory order. With return_lse also lse (B, H, Nq), float32 (float64 for float64),
        natural logarithm, differentiable. A query that sees no key gives 0, zero gradients, and lse -inf (or the sink). (For
        16-bit inputs, PyTorch's fused CPU attention, which the backend cpu uses where it can, gives lse with errors of some
        1e-5.)

    Under torch.autocast, inputs and float masks are converted to the autocast dtype first, except float64, as in PyTorch.
    The backward is deterministic. Second derivatives and forward-mode raise NotImplementedError.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range, named in the message.
        NotImplementedError: what is not built yet.
        tfkern.UnsupportedError: the named backend does not support this call, or its backward if a tensor requires grad; the
            message says why.

    Source: Dao et al., "FlashAttention" (2022) and "FlashAttention-2" (2023); online softmax by Milakov and Gimelshein (2018);
    ALiBi by Press et al. (2022); softcap as in Gemma 2 (2024); sinks by Xiao et al. (2024), learned as in gpt-oss (2025).
    """
    options = Options(
        dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, causal_alignment=causal_alignment,
        window=window, softcap=softcap, score_mod=score_mod, precise_delta=precise_delta,
    )  # fmt: skip
    if isinstance(query, Tensor) and query.is_nested:
        q, k, v, cu_q, cu_k = nested.packed(query, key, value, key_lengths)
        inputs = Inputs(q, k, v, attn_mask, alibi_slopes, sinks, None, cu_q, cu_k)
        return nested.nested(_attend(inputs, options, return_lse, backend), query)
    inputs = Inputs(query, key, value, attn_mask, alibi_slopes, sinks, key_lengths)
    return _attend(inputs, options, return_lse, backend)


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | Tensor | None = None, enable_gqa: bool = False, *,
    causal_alignment: str = "upper_left", window: tuple[int | None, int | None] | None = None, softcap: float | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, score_mod: Pair | None = None,
    precise_delta: bool = False, return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` of B sequences of any lengths, packed one after the other without padding.

    The lengths stay on the device: no call waits for it, and no maximum length is needed.

    Args:
        query: (total_q, H, D), any strides. Differentiable, as key and value.
        key: (total_k, Hkv, D).
        value: (total_k, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32 or int64, rising from 0. Sequence b has the queries from cu_seqlens_q[b] up to, without,
            cu_seqlens_q[b + 1], and may be empty. Rows from cu_seqlens_q[B] on belong to no sequence and give 0. On a GPU the
            values are not checked (that would stop the stream); whatever they are, no memory outside the tensors is accessed.
        cu_seqlens_k: (B + 1,), the same for keys and values.
        attn_mask: broadcasts to (B, H, L, M), where L and M are at least the lengths of the longest sequences of queries and of
            keys. Sequence b of lengths n and m uses [b, :, :n, :m]; elsewhere the gradient is 0.
        alibi_slopes: (H,) or (B, H).

    The other arguments as in `attention`; i, j and shift count within a sequence.

    Returns:
        (total_q, H, Dv) in query's dtype and memory order. With return_lse also lse (H, total_q), differentiable.

    Raises: as attention.
    """
    options = Options(
        dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, causal_alignment=causal_alignment,
        window=window, softcap=softcap, score_mod=score_mod, precise_delta=precise_delta,
    )  # fmt: skip
    inputs = Inputs(query, key, value, attn_mask, alibi_slopes, sinks, None, cu_seqlens_q, cu_seqlens_k)
    return _attend(inputs, options, return_lse, backend)


def attention_packed(
    qkv: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | Tensor | None = None, *, cu_seqlens: Tensor | None = None, causal_alignment: str = "upper_left",
    window: tuple[int | None, int | None] | None = None, key_lengths: Tensor | None = None, softcap: float | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, score_mod: Pair | None = None,
    precise_delta: bool = False, return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` of queries, keys and values in one tensor, as one projection computes them. Nothing is copied.

    Args:
        qkv: (B, N, 3, H, D), or with cu_seqlens (total, 3, H, D). Differentiable; its gradient is written as one tensor.
        cu_seqlens: (B + 1,) the starts of packed sequences and the end of the last, as in `attention_varlen`.

    The other arguments as in `attention` (key_lengths only without cu_seqlens).

    Returns:
        (B, N, H, D), or (total, H, D), in qkv's memory order. If that is contiguous, `.flatten(-2)` makes the input of the next
        projection without a copy. With return_lse also lse (B, H, N), or (H, total).

    Raises: as attention.
    """
    tracing.refuse("tfkern.attention_packed", qkv)
    checks.packed_qkv(qkv, cu_seqlens is not None)
    qkv = call.cast(qkv, call.autocast_dtype(qkv))
    query, key, value = call.unpack(qkv.detach())
    if cu_seqlens is not None:
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    options = Options(
        dropout_p=dropout_p, is_causal=is_causal, scale=scale, causal_alignment=causal_alignment, window=window,
        softcap=softcap, score_mod=score_mod, precise_delta=precise_delta,
    )  # fmt: skip
    inputs = Inputs(query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens, cu_seqlens)
    out = _attend(inputs, options, return_lse, backend, qkv)
    if cu_seqlens is not None:
        return out
    return (out[0].transpose(1, 2), out[1]) if return_lse else out.transpose(1, 2)


@uncompiled
def explain(query: Tensor, key: Tensor, value: Tensor, *args, return_lse=False, backend=None, **kwargs) -> str:
    """The backend that `attention` would use for these arguments, and the reasons why not the ones before it. Computes nothing.

    The arguments are those of `attention`, or with cu_seqlens_q and cu_seqlens_k by name those of `attention_varlen`. As in a
    call, a tensor that requires grad asks for the backward too, unless grad mode is off.

    Raises: as attention, but no UnsupportedError: if no backend can do the problem, the text says why.
    """
    problem, tensors = call.build(query, key, value, *args, **kwargs)
    return backends.explain(problem, backend, autograd.differentiated(tensors))


def _attend(inputs: Inputs, options: Options, return_lse: bool, backend: str | None, qkv: Tensor | None = None):
    """out, or with return_lse (out, lse), of any public function. With qkv, query, key and value are views of it, and their
    gradient is one tensor.

    This function calls the backend, or the autograd.Function that calls it, directly: the fewer Python frames between a warm
    call and its launch, the less a call costs.
    """
    tracing.refuse("tfkern.attention", *inputs)
    traced = torch.compiler.is_compiling() or tracing.make_fx()
    if not traced:
        problem, t = call.prepare(inputs, options)
        traced = checks.shapes_only(t.q)
        if traced:
            backends.known(backend)
    if traced:
        out, stats, unit = ops.attention(inputs, options, backend, qkv)
    else:
        needs_grad = autograd.differentiated((qkv, *t))
        chosen = backends.choose(problem, backend, needs_grad)
        if problem.dropout_p:
            t = t._replace(seed=dropout.draw_seed(problem.device))
        if needs_grad:
            leaves = t if qkv is None else t._replace(q=qkv, k=None, v=None)
            out, stats = autograd.applied(autograd.Attention)(problem, chosen, *leaves)
        elif chosen.output is not None and not return_lse:
            out, stats = chosen.output(problem, t), None
        else:
            out, stats = chosen.forward(problem, t)
        unit = problem.unit(t) if return_lse else None
    lse = lse_of(stats, unit) if return_lse else None
    if inputs.cu_seqlens_q is not None:
        out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0) if return_lse else None
    return (out, lse) if return_lse else out
