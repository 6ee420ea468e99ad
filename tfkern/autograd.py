"""The autograd Function and its backward, itself a Function, so that higher derivatives have a place to come to."""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tfkern import call, compat
from tfkern.problem import Gradients, Problem, Tensors


def attention(
    problem: Problem, backend, tensors: Tensors, qkv: Tensor | None = None, want_stats: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(out, stats) of one problem by one backend, differentiable in the first six tensors; stats may be None where nobody wants
    them. With qkv, of which query, key and value are views, the gradient of those is one tensor like it."""
    if qkv is not None:
        tensors = tensors._replace(q=qkv, k=None, v=None)
    if not _transformed() and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:6])):
        if backend.output is not None and not want_stats:
            return backend.output(problem, call.unpacked(tensors)), None
        return Attention.forward(problem, backend, *tensors)
    return apply(Attention, problem, backend, *tensors)


def _transformed() -> bool:
    """Whether torch.func or forward-mode AD may have a say in what a Function does."""
    return compat.transforms() or compat.forward_mode()


def refuse_tangents(tensors) -> None:
    """NotImplementedError for tensors of forward-mode AD, where no Function would be asked for their derivatives."""
    if compat.forward_mode() and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        Attention.jvp(None)


def refuse_second() -> None:
    raise NotImplementedError("second derivatives of tfkern.attention are not built yet; tfkern.reference.attention has them")


def one_by_one(function, count: int, in_dims, args) -> tuple[tuple, tuple]:
    """What torch.vmap wants: `function` of each of `count` slices along a mapped dim, stacked. That way it has every feature,
    sinks and packed sequences too; who wants one launch folds the dim into the batch."""
    slices = (
        function(*(x.select(d, n) if isinstance(d, int) else x for x, d in zip(args, in_dims, strict=True)))
        for n in range(count)
    )
    stacked = tuple(None if some[0] is None else torch.stack(some) for some in zip(*slices, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)


def one_by_one_of_batched(function, args) -> tuple:
    """`function`, once for each of several gradients, those of torch.autograd.grad(..., is_grads_batched=True)."""
    in_dims = [0 if compat.batched(x) else None for x in args]
    args = [x if d is None else compat.unbatched(x) for x, d in zip(args, in_dims, strict=True)]
    count = next(len(x) for x, d in zip(args, in_dims, strict=True) if d is not None)
    stacked, _ = one_by_one(function, count, in_dims, args)
    return tuple(None if x is None else compat.batch(x) for x in stacked)


def apply(function, problem, backend, *args):
    """function.apply for 3 microseconds, not 27: PyTorch's own first binds the arguments to the signature of forward, for the
    sake of transforms, which are the only ones to need it. (An op has met them before its kernel applies the Function.)"""
    if not _transformed():
        return compat.apply(function, problem, backend, *args)
    if not backend.recorded or function is AttentionBackward:
        return function.apply(problem, backend, *args)
    return compat.apply_within_op(function, problem, backend, *args)


def forward(problem, backend, t: Tensors) -> tuple[Tensor, Tensor]:
    """(out, stats), without derivatives; q may be the packed qkv."""
    return backend.forward(problem, t if backend.recorded else call.unpacked(t))


def backward(problem, backend, needed, do, dlse, out, stats, t: Tensors) -> tuple[Tensor | None, ...]:
    """The gradients, without derivatives; q may be the packed qkv, whose gradient is one tensor then."""
    if t.k is not None or backend.recorded:
        return tuple(backend.backward(problem, t, out, stats, do, dlse, needed))
    qkv = torch.empty_like(t.q)
    needed = (needed[0],) * 3 + needed[3:]
    grads = backend.backward(problem, call.unpacked(t), out, stats, do, dlse, needed, into=call.unpack(qkv))
    return qkv, None, None, *grads[3:]


class Attention(torch.autograd.Function):
    """out, stats = attention(tensors). Of the gradient of stats, that of log l is lse's; m counts as a constant."""

    @staticmethod
    def forward(problem, backend, *tensors):
        return forward(problem, backend, Tensors(*tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dstats):
        *tensors, out, stats = ctx.saved_tensors
        if do is None and dstats is None:
            return (None,) * (2 + len(tensors))
        if do is None:
            do = torch.zeros_like(out)
        dlse = None if dstats is None else dstats.select(2, 1)
        needed = ctx.needs_input_grad[2 : 2 + len(Gradients._fields)]
        # Where nobody will differentiate the gradients, as in most backwards, their Function has nothing to record.
        arguments = (ctx.problem, ctx.backend, needed, do, dlse, out, stats, *tensors)
        function = AttentionBackward.forward
        if torch.is_grad_enabled() or _transformed():
            function = functools.partial(apply, AttentionBackward)
        several = compat.batched(do) or compat.batched(dlse)
        grads = one_by_one_of_batched(function, arguments) if several else function(*arguments)
        return None, None, *grads, *(None,) * (len(tensors) - len(grads))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("forward-mode derivatives (jvp) of tfkern.attention are not built yet; use reverse mode")

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(Attention.apply, info.batch_size, in_dims, args)


class AttentionBackward(torch.autograd.Function):
    """Gradients from do, dlse and what the forward saved."""

    @staticmethod
    def forward(problem, backend, needed, do, dlse, out, stats, *tensors):
        return backward(problem, backend, needed, do, dlse, out, stats, Tensors(*tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_second()

    jvp = Attention.jvp

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(AttentionBackward.apply, info.batch_size, in_dims, args)
