"""The ops that torch.compile, torch.export, fake and meta tensors record in place of a call.

`tfkern::attention` is differentiable. Differentiated in a trace it becomes `tfkern::attention_forward`, and in the backward
`tfkern::attention_backward`. Other eager calls never come here.

An op takes the fields of Tensors, then those of OpOptions. It derives the Problem when it runs, from the shapes it gets: no
length is a constant of a compiled graph. The fakes give the shapes, dtypes and strides of the results.

Source: PyTorch has several ways to register an op. With this one, an Autograd kernel that applies an autograd.Function,
torch.func and forward-mode AD never return a wrong derivative: they work or raise.
"""

from collections import namedtuple

import torch
from torch import Tensor

from tfkern import autograd, backends, call, checks, compat, dropout, dynamo, layout, score_mods
from tfkern.options import Inputs, Options, Scale, ScoreMod, Window
from tfkern.problem import Problem, Tensors, lse_dtype, stats_rows

# The arguments of a schema for a field of Options, by its type. window is passed as its sides, which may be symbols, and
# score_mod as its name. A scale that is a tensor is passed among the tensors, as scale_tensor.
_ARGUMENTS = {
    bool: "bool {}", float: "float {}", str: "str {}", float | None: "float? {}", Scale: "float? {}", ScoreMod: "str? {}",
    Window: "SymInt? left, SymInt? right",
}  # fmt: skip
_OPTIONS = ", ".join(
    [_ARGUMENTS[kind].format(name) for name, kind in Options.__annotations__.items()] + ["str? backend"],
)
# q may be the packed qkv, without k and v then.
_TENSORS = "Tensor q, " + ", ".join(f"Tensor? {dict(scale='scale_tensor').get(name, name)}" for name in Tensors._fields[1:])
_COUNT = len(Tensors._fields)
# Options as an op takes them, and the name of the backend.
OpOptions = namedtuple("OpOptions", [argument.split()[1] for argument in _OPTIONS.split(", ")])

_library = torch.library.Library("tfkern", "FRAGMENT")
# Strides decide which form of a kernel runs, and the fakes derive strides from those of the inputs.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_library.define(f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"attention_forward({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"attention_backward(Tensor do, Tensor? dlse, Tensor out, Tensor stats, bool[] needed, {_TENSORS}, {_OPTIONS}) -> Tensor[]",
    tags=_TAGS,
)
_library.define("draw_seed(Device device) -> Tensor", tags=torch.Tag.nondeterministic_seeded)


def attention(
    inputs: Inputs, options: Options, backend: str | None, qkv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """(out, stats, the unit of stats) by `tfkern::attention`, for Dynamo to trace."""
    t, asked = op_arguments(inputs, options, backend, qkv)
    return *torch.ops.tfkern.attention(*t, *asked), _unit(t, asked)


def op_arguments(
    inputs: Inputs, options: Options, backend: str | None = None, qkv: Tensor | None = None
) -> tuple[Tensors, OpOptions]:
    """What the op takes for a call, after autocast and the checks that need no values. With qkv, whose views query, key and
    value are, the op takes qkv as q."""
    inputs = call.autocast(inputs)
    call.fit(inputs, options.enable_gqa)
    t, query, scale = call.views(inputs, None), inputs.query, options.scale
    if qkv is not None:
        t = t._replace(q=qkv, k=None, v=None)
    if isinstance(scale, Tensor):
        checks.scale(scale, 1, query)
        t, scale = t._replace(scale=scale), None
    if options.dropout_p:
        t = t._replace(seed=torch.ops.tfkern.draw_seed(query.device))
    checks.flag("is_causal", options.is_causal)
    checks.flag("precise_delta", options.precise_delta)
    left, right = checks.sides(options.window)
    named = dict(zip(Options._fields, options, strict=True)) | dict(
        scale=scale,
        left=left,
        right=right,
        score_mod=None if options.score_mod is None else _name(options.score_mod, query),
        backend=backend,
    )
    return t, OpOptions(*[named[name] for name in OpOptions._fields])


def _options(asked: OpOptions, scale: Tensor | None) -> Options:
    """The inverse of op_arguments."""
    named = asked._asdict() | dict(
        scale=asked.scale if scale is None else scale,
        window=(asked.left, asked.right),
        score_mod=None if asked.score_mod is None else score_mods.named(asked.score_mod),
    )
    return Options(*[named[name] for name in Options._fields])


def _unit(t: Tensors, asked: OpOptions) -> float | Tensor:
    """Problem.unit, without a Problem."""
    if any(x is not None for x in (t.bias, t.slopes, t.sinks, asked.softcap, asked.score_mod)):
        return 1.0
    return checks.scale(asked.scale, t.q.shape[-1], t.q) if t.scale is None else t.scale.reshape(())


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


def _understood(t: Tensors, asked: OpOptions, needs_grad: bool) -> tuple[Problem, backends.Backend, Tensors]:
    """(problem, backend, tensors) of an op that runs."""
    query, key, value = call.unpacked(t)[:3]
    if t.cu_q is not None:
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    slopes = t.slopes
    if slopes is not None and len(slopes) == 1:
        slopes = slopes[0]
    mask = t.mask if t.bias is None else t.bias
    inputs = Inputs(query, key, value, mask, slopes, t.sinks, t.key_lengths, t.cu_q, t.cu_k)
    problem = call.describe(inputs, _options(asked, t.scale))
    chosen = backends.choose(problem, asked.backend, needs_grad)
    return problem, chosen, t._replace(scale=call.on_device(t.scale, query))


def _draw_seed(device: torch.device) -> Tensor:
    """dropout.draw_seed in a graph, by an operation for which no compiler substitutes a generator of its own."""
    with dynamo.drawn_once():
        return torch.ops.aten.randint.low_generator(*dropout.SEEDS, (2,), generator=None, dtype=torch.int64, device=device)


def _split(arguments: tuple) -> tuple[Tensors, OpOptions]:
    return Tensors(*arguments[:_COUNT]), OpOptions(*arguments[_COUNT:])


def _without_grad(*arguments):
    problem, backend, t = _understood(*_split(arguments), needs_grad=False)
    return autograd.Attention.forward(problem, backend, *t)


def _forward(*arguments):
    problem, backend, t = _understood(*_split(arguments), needs_grad=True)
    return autograd.Attention.forward(problem, backend, *t)


def _backward(do, dlse, out, stats, needed, *arguments):
    problem, backend, t = _understood(*_split(arguments), needs_grad=True)
    grads = autograd.AttentionBackward.forward(problem, backend, tuple(needed), do, dlse, out, stats, *t)
    return [grad for grad, need in zip(grads, needed, strict=True) if need]


def _forward_fake(*arguments):
    t, asked = _split(arguments)
    t = call.unpacked(t)
    out = layout.empty_in_order_of(t.q, t.v.shape[-1])
    batch, heads, rows = t.q.shape[:3]
    kept = stats_rows(t.q.dtype, t.v.shape[-1], asked.precise_delta)
    return out, torch.empty(batch, heads, kept, rows, dtype=lse_dtype(t.q.dtype), device=t.q.device)


def _backward_fake(do, dlse, out, stats, needed, *arguments):
    t, _ = _split(arguments)
    if t.k is None:
        likes = [torch.empty_like(t.q) if needed[0] else None, None, None]
    else:
        likes = [layout.empty_in_order_of(x, x.shape[-1]) if need else None for x, need in zip(t[:3], needed, strict=False)]
    wanted = [x for x, need in zip(t[3:6], needed[3:], strict=True) if need]
    return [x for x in likes if x is not None] + [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]


class Recorded(torch.autograd.Function):
    """`tfkern::attention_forward`, whose backward is RecordedBackward: a trace gets ops, not what they do."""

    @staticmethod
    def forward(asked, *tensors):
        with compat.below_autograd():  # of this level; outer transforms call the Autograd kernel again
            return torch.ops.tfkern.attention_forward(*tensors, *asked)

    @staticmethod
    def setup_context(ctx, inputs, output):
        asked, *tensors = inputs
        autograd.save(ctx, (asked,), tensors, output)

    @staticmethod
    def backward(ctx, do, dstats):
        return None, *autograd.gradients(ctx, ctx.needs_input_grad[1:], RecordedBackward, do, dstats)

    jvp = staticmethod(autograd.refuse_jvp)


class RecordedBackward(torch.autograd.Function):
    """`tfkern::attention_backward`."""

    @staticmethod
    def forward(asked, needed, do, dlse, out, stats, *tensors):
        with compat.below_autograd():
            grads = iter(torch.ops.tfkern.attention_backward(do, dlse, out, stats, needed, *tensors, *asked))
        return tuple(next(grads) if need else None for need in needed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        autograd.refuse_second()

    jvp = staticmethod(autograd.refuse_jvp)

    @staticmethod
    def vmap(info, in_dims, *args):
        return autograd.one_by_one(RecordedBackward.apply, info.batch_size, in_dims, args)


def _differentiable(*arguments):
    """The Autograd kernel of `tfkern::attention`."""
    t, asked = _split(arguments)
    autograd.refuse_tangents(t)
    if not _wanted(t):
        with compat.below_autograd():
            return torch.ops.tfkern.attention(*arguments)
    return _recorded(t, asked)


def _recorded(t: Tensors, asked: OpOptions):
    if autograd.transformed():  # and has called this kernel
        return compat.apply_within_op(Recorded, asked, *t)
    return compat.apply_of(Recorded)(asked, *t)


def _differentiable_forward(*arguments):
    """The Autograd kernel of `tfkern::attention_forward`, which a program decomposed by torch.export contains."""
    t, asked = _split(arguments)
    autograd.refuse_tangents(t)
    if not _wanted(t):
        return Recorded.forward(asked, *t)
    if compat.transforms():  # the derivative of what an inner transform has differentiated
        autograd.refuse_second()
    return _recorded(t, asked)


def _refused_backward(do, dlse, out, stats, needed, *arguments):
    """The Autograd kernel of `tfkern::attention_backward`."""
    tensors = (do, dlse, out, stats, *arguments[:_COUNT])
    autograd.refuse_tangents(tensors)
    if _wanted(tensors):
        autograd.refuse_second()
    with compat.below_autograd():
        return torch.ops.tfkern.attention_backward(do, dlse, out, stats, needed, *arguments)


def _wanted(tensors) -> bool:
    """Whether derivatives with respect to one of the tensors are asked for. (Inner transforms turn grad mode off for outer
    ones.)"""
    able = torch.is_grad_enabled() or compat.transforms()
    return able and any(x is not None and x.requires_grad for x in tensors)


def _kept(ctx, inputs, output) -> None:
    """setup_context for torch.library.register_autograd."""
    t, asked = _split(inputs)
    autograd.save(ctx, (asked,), t, output)


def _gradients(ctx, do, dstats) -> tuple:
    """The backward for torch.library.register_autograd."""
    grads = autograd.gradients(ctx, ctx.needs_input_grad, RecordedBackward, do, dstats)
    return *grads, *(None,) * len(OpOptions._fields)


_library.impl("draw_seed", _draw_seed, "CompositeImplicitAutograd")
# register_autograd runs the same kernel whether the call is differentiated or not.
_library.impl("attention", _without_grad if compat.KERNELS else _forward, "CompositeExplicitAutograd")
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
    """Register the vmap rule of an op."""
    op = getattr(torch.ops.tfkern, name)

    def vmap(info, in_dims, *args):
        out, dims = autograd.one_by_one(op, info.batch_size, in_dims, args)
        return (list(out), list(dims)) if as_list else (out, dims)

    torch.library.register_vmap(f"tfkern::{name}", vmap)


_mapped("attention")
_mapped("attention_forward")
_mapped("attention_backward", as_list=True)
