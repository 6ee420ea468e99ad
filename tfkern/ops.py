"""The ops that torch.compile, torch.export, fake and meta tensors see in the place of a call: `tfkern::attention`,
differentiable, and what it becomes when it is differentiated, `tfkern::attention_forward` and `tfkern::attention_backward`.

Eager calls of other tensors never come here. The ops take a call's tensors as `Tensors` has them, and its options; what is to
be done is worked out when they run, from the shapes that there are then, so that no length is built into a compiled graph.
Their fakes tell the shapes, dtypes and strides of what they return.

Source: of the ways to register an op, the one that also keeps torch.func and forward-mode AD from going wrong without a word:
an Autograd kernel that applies the same autograd.Function as eager calls.
"""

import types

import torch
from torch import Tensor

from tfkern import autograd, backends, call, checks, compat, dropout, dynamo, layout, score_mods
from tfkern.backends import Backend
from tfkern.problem import Problem, Tensors, lse_dtype, stats_rows

# As Tensors; qkv in the place of q where k is missing. bias, slopes and masks as Tensors wants them.
_TENSORS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? slopes, Tensor? sinks, Tensor? mask, Tensor? key_lengths, "
    "Tensor? cu_q, Tensor? cu_k, Tensor? seed, Tensor? scale_tensor"
)
_OPTIONS = (
    "float dropout_p, bool is_causal, float? scale, bool enable_gqa, str causal_alignment, SymInt? left, SymInt? right, "
    "float? softcap, str? score_mod, bool precise_delta, str? backend"
)
_COUNT = len(Tensors._fields)
_library = torch.library.Library("tfkern", "FRAGMENT")
# Strides decide which form of a kernel runs, and the fakes promise strides that follow from those of the inputs.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_library.define(f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"attention_forward({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"attention_backward(Tensor do, Tensor? dlse, Tensor out, Tensor stats, bool[] needed, {_TENSORS}, {_OPTIONS}) -> Tensor[]",
    tags=_TAGS,
)
_library.define("draw_seed(Device device) -> Tensor", tags=torch.Tag.nondeterministic_seeded)


def attention(backend: str | None, qkv: Tensor | None, tensors: tuple, options: tuple) -> tuple[Tensor, Tensor]:
    """(out, stats, their unit) by `tfkern::attention`, of what call.describe takes; for Dynamo to trace."""
    given = op_arguments(backend, qkv, tensors, options)
    return *torch.ops.tfkern.attention(*given), _unit(Tensors(*given[:_COUNT]), *given[_COUNT:])


def op_arguments(backend: str | None, qkv: Tensor | None, tensors: tuple, options: tuple) -> tuple:
    """What the op takes, of what call.describe takes, before autocast."""
    query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k = tensors
    dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap, score_mod, precise_delta = options
    query, key, value, attn_mask, alibi_slopes, sinks = call.autocast(query, key, value, attn_mask, alibi_slopes, sinks)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    call.fit(query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, enable_gqa)
    tensors = call.collect(
        packed, query, key, value, attn_mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, None
    )
    if qkv is not None:
        tensors = tensors._replace(q=qkv, k=None, v=None)
    if isinstance(scale, Tensor):
        checks.scale(scale, 1, query)
        tensors, scale = tensors._replace(scale=scale), None
    if dropout_p:
        tensors = tensors._replace(seed=torch.ops.tfkern.draw_seed(query.device))
    checks.flag("is_causal", is_causal)
    checks.flag("precise_delta", precise_delta)
    left, right = checks.sides(window)
    name = None if score_mod is None else _name(score_mod, query)
    options = dropout_p, is_causal, scale, enable_gqa, causal_alignment, left, right, softcap, name, precise_delta, backend
    return *tensors, *options


def _unit(t: Tensors, dropout_p, is_causal, scale, enable_gqa, causal_alignment, left, right, softcap, score_mod, *more):
    """Problem.unit, or the tensor that scale is."""
    if any(x is not None for x in (t.bias, t.slopes, t.sinks, softcap, score_mod)):
        return 1.0
    return checks.scale(scale, t.q.shape[-1], t.q) if t.scale is None else t.scale.reshape(())


def _name(score_mod, query: Tensor) -> str:
    """The name of a score_mod, found while tracing."""
    if isinstance(score_mod, score_mods.ScoreMod):
        return score_mod.name
    if query.device.type != "cpu" and torch.compiler.is_compiling():
        raise TypeError(
            "score_mod must be a tfkern.ScoreMod(value, derivative) under torch.compile on a GPU, but is an ordinary pair: "
            "Dynamo can't pass @triton.jit functions on; make one outside of what is compiled"
        )
    return score_mods.name_of(*score_mod)


def _understood(tensors: tuple, options: tuple) -> tuple[Problem, Backend, Tensors]:
    """What an op is asked to do, by what, with what."""
    given = Tensors(*tensors)
    dropout_p, is_causal, scale, enable_gqa, alignment, left, right, softcap, score_mod, precise_delta, backend = options
    query, key, value, slopes = *call.unpacked(given)[:3], given.slopes
    if given.cu_q is not None:
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if slopes is not None and len(slopes) == 1:
        slopes = slopes[0]
    scale = scale if given.scale is None else given.scale
    problem = call.describe(
        (
            query, key, value, given.mask if given.bias is None else given.bias, slopes, given.sinks, given.key_lengths,
            given.cu_q, given.cu_k,
        ),
        (
            dropout_p, is_causal, scale, enable_gqa, alignment, (left, right), softcap,
            None if score_mod is None else score_mods.named(score_mod), precise_delta,
        ),
    )  # fmt: skip
    given = given._replace(scale=call.on_device(given.scale, query))
    return problem, backends.choose(problem, backend), given


def _draw_seed(device: torch.device) -> Tensor:
    """dropout.draw_seed in a graph: by an operation in whose place no compiler puts a generator of its own."""
    with dynamo.drawn_once():
        return torch.ops.aten.randint.low_generator(*dropout.SEEDS, (2,), generator=None, dtype=torch.int64, device=device)


def _forward(*arguments):
    problem, backend, tensors = _understood(arguments[:_COUNT], arguments[_COUNT:])
    return autograd.forward(problem, backend, tensors)


def _backward(do, dlse, out, stats, needed, *arguments):
    problem, backend, tensors = _understood(arguments[:_COUNT], arguments[_COUNT:])
    grads = autograd.backward(problem, backend, tuple(needed), do, dlse, out, stats, tensors)
    return [grad for grad, need in zip(grads, needed, strict=True) if need]


def _forward_fake(*arguments):
    t = call.unpacked(Tensors(*arguments[:_COUNT]))
    out = layout.empty_in_order_of(t.q, t.v.shape[-1])
    batch, heads, rows = t.q.shape[:3]
    kept = stats_rows(t.q.dtype, t.v.shape[-1], arguments[-2])
    return out, torch.empty(batch, heads, kept, rows, dtype=lse_dtype(t.q.dtype), device=t.q.device)


def _backward_fake(do, dlse, out, stats, needed, *arguments):
    t = Tensors(*arguments[:_COUNT])
    if t.k is None:
        likes = [torch.empty_like(t.q) if needed[0] else None, None, None]
    else:
        likes = [layout.empty_in_order_of(x, x.shape[-1]) if need else None for x, need in zip(t[:3], needed, strict=False)]
    wanted = [x for x, need in zip(t[3:6], needed[3:], strict=True) if need]
    return [x for x in likes if x is not None] + [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]


def _recorded_forward(options: tuple, t: Tensors):
    with compat.below_autograd():  # of this level; transforms further out meet the Autograd kernel again
        return torch.ops.tfkern.attention_forward(*t, *options)


def _recorded_backward(options: tuple, t: Tensors, out, stats, do, dlse, needed):
    with compat.below_autograd():
        grads = iter(torch.ops.tfkern.attention_backward(do, dlse, out, stats, needed, *t, *options))
    return [next(grads) if need else None for need in needed]


# In the place of a backend: the ops, for a trace to have them and not what they do. Its problem are the options of a call.
_RECORDED = Backend(lambda options: [], _recorded_forward, _recorded_backward, recorded=True)


def _differentiable(*arguments):
    """The Autograd kernel of `tfkern::attention`."""
    return autograd.apply(autograd.Attention, arguments[_COUNT:], _RECORDED, *arguments[:_COUNT])


def _differentiable_forward(*arguments):
    """That of `tfkern::attention_forward`, which torch.export leaves when it decomposes."""
    autograd.refuse_tangents(arguments[:_COUNT])
    if not _wanted(arguments[:_COUNT]):
        return _recorded_forward(arguments[_COUNT:], arguments[:_COUNT])
    if compat.transforms():  # a derivative of what a transform further in has differentiated
        autograd.refuse_second()
    return _differentiable(*arguments)


def _refused_backward(do, dlse, out, stats, needed, *arguments):
    """That of `tfkern::attention_backward`."""
    tensors = (do, dlse, out, stats, *arguments[:_COUNT])
    autograd.refuse_tangents(tensors)
    if _wanted(tensors):
        autograd.refuse_second()
    with compat.below_autograd():
        return torch.ops.tfkern.attention_backward(do, dlse, out, stats, needed, *arguments)


def _wanted(tensors) -> bool:
    """Whether somebody wants derivatives with respect to one of them. (Transforms turn grad mode off for those further out.)"""
    able = torch.is_grad_enabled() or compat.transforms()
    return able and any(x is not None and x.requires_grad for x in tensors)


def _kept(ctx, inputs, output) -> None:
    """What torch.library.register_autograd wants for the gradients of `tfkern::attention`."""
    autograd.Attention.setup_context(ctx, (inputs[_COUNT:], _RECORDED, *inputs[:_COUNT]), output)


def _gradients(ctx, *grads) -> tuple:
    context = types.SimpleNamespace(
        problem=ctx.problem, backend=ctx.backend, saved_tensors=ctx.saved_tensors,
        needs_input_grad=(False, False, *ctx.needs_input_grad),
    )  # fmt: skip
    return *autograd.Attention.backward(context, *grads)[2:], *(None,) * len(ctx.problem)


_library.impl("draw_seed", _draw_seed, "CompositeImplicitAutograd")
_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
if compat.KERNELS:
    _library.impl("attention", _differentiable, "Autograd")
    _library.impl("attention_forward", _differentiable_forward, "Autograd")
    _library.impl("attention_backward", _refused_backward, "Autograd")
else:
    torch.library.register_autograd("tfkern::attention", _gradients, setup_context=_kept)
    torch.library.register_autograd("tfkern::attention_forward", _gradients, setup_context=_kept)
    torch.library.register_autograd("tfkern::attention_backward", lambda ctx, *grads: autograd.refuse_second())
torch.library.register_fake("tfkern::attention", _forward_fake)
torch.library.register_fake("tfkern::attention_forward", _forward_fake)
torch.library.register_fake("tfkern::attention_backward", _backward_fake)


def _mapped(name: str, as_list: bool = False) -> None:
    """Let torch.vmap take an op."""
    op = getattr(torch.ops.tfkern, name)

    def vmap(info, in_dims, *args):
        out, dims = autograd.one_by_one(op, info.batch_size, in_dims, args)
        return (list(out), list(dims)) if as_list else (out, dims)

    torch.library.register_vmap(f"tfkern::{name}", vmap)


_mapped("attention")
_mapped("attention_forward")
_mapped("attention_backward", as_list=True)
