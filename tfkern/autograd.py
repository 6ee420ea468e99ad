"""The autograd Functions of a call: Attention, and AttentionBackward, which is a Function too so that second derivatives raise.

ops.py has a pair of its own, for calls that are recorded as ops. What both pairs share is here as plain functions: PyTorch and
compat.apply_within_op look at a Function's own attributes, not at inherited ones.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tfkern import call, compat
from tfkern.problem import Gradients, Tensors


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active, which may differentiate what doesn't require grad."""
    return compat.transforms() or compat.forward_mode()


def differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a derivative of an eager call may be asked for: grad mode is on and a tensor requires grad, or a transform is
    active."""
    if torch.is_grad_enabled():
        for x in tensors:  # any() of a generator takes a microsecond more
            if x is not None and x.requires_grad:
                return True
    return transformed()


def applied(function: type[torch.autograd.Function]):
    """function.apply, in 3 microseconds instead of 27 where no transform is active: PyTorch's own binds the arguments to the
    signature of forward first, which only transforms need."""
    return function.apply if transformed() else compat.apply_of(function)


def refuse_jvp(ctx, *tangents):
    """The jvp of all Functions: raises NotImplementedError."""
    raise NotImplementedError("forward-mode derivatives (jvp) of tfkern.attention are not built yet; use reverse mode")


def refuse_tangents(tensors) -> None:
    """Raise NotImplementedError for tensors with a tangent, where no Function would be asked for its jvp."""
    if compat.forward_mode() and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        refuse_jvp(None)


def refuse_second() -> None:
    raise NotImplementedError("second derivatives of tfkern.attention are not built yet; tfkern.reference.attention has them")


def save(ctx, asked: tuple, tensors, output) -> None:
    """setup_context of a forward; `asked` are the leading arguments of the forward and of its backward."""
    ctx.asked = asked
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def gradients(ctx, needed: tuple[bool, ...], function, do: Tensor | None, dstats: Tensor | None) -> tuple:
    """The backward of a forward: a gradient or None for each field of Tensors. `function` makes them: AttentionBackward or
    ops.RecordedBackward. Of dstats only the part of log l is used, which is dlse."""
    *tensors, out, stats = ctx.saved_tensors
    if do is None and dstats is None:
        return (None,) * len(tensors)
    if do is None:
        do = torch.zeros_like(out)
    dlse = None if dstats is None else dstats.select(2, 1)
    # Most gradients are not differentiated again: then nothing is recorded, and no Function applied.
    run = applied(function) if torch.is_grad_enabled() or transformed() else function.forward
    arguments = (*ctx.asked, needed[: len(Gradients._fields)], do, dlse, out, stats, *tensors)
    several = compat.batched(do) or compat.batched(dlse)
    grads = one_by_one_of_batched(run, arguments) if several else run(*arguments)
    return *grads, *(None,) * (len(tensors) - len(grads))


def one_by_one(function, count: int, in_dims, args) -> tuple[tuple, tuple]:
    """The vmap rule of `function`: (outputs, their mapped dims), from a call for each of `count` slices along the mapped dims.

    All features work that way, sinks and packed sequences too. To have one launch instead, fold the mapped dim into the batch.
    """
    slices = (
        function(*(x.select(d, n) if isinstance(d, int) else x for x, d in zip(args, in_dims, strict=True)))
        for n in range(count)
    )
    stacked = tuple(None if some[0] is None else torch.stack(some) for some in zip(*slices, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)


def one_by_one_of_batched(function, args) -> tuple:
    """`function`, called for each of several gradients, as torch.autograd.grad(..., is_grads_batched=True) passes them."""
    in_dims = [0 if compat.batched(x) else None for x in args]
    args = [x if d is None else compat.unbatched(x) for x, d in zip(args, in_dims, strict=True)]
    count = next(len(x) for x, d in zip(args, in_dims, strict=True) if d is not None)
    stacked, _ = one_by_one(function, count, in_dims, args)
    return tuple(None if x is None else compat.batch(x) for x in stacked)


class Attention(torch.autograd.Function):
    """(out, stats) of a Problem by a Backend, from the fields of Tensors; q may be the packed qkv, whose gradient is one tensor
    then. The gradient of stats flows through log l, as that of lse; m counts as a constant."""

    @staticmethod
    def forward(problem, backend, *tensors):
        return backend.forward(problem, call.unpacked(Tensors(*tensors)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        problem, backend, *tensors = inputs
        save(ctx, (problem, backend), tensors, output)

    @staticmethod
    def backward(ctx, do, dstats):
        return None, None, *gradients(ctx, ctx.needs_input_grad[2:], AttentionBackward, do, dstats)

    jvp = staticmethod(refuse_jvp)

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(Attention.apply, info.batch_size, in_dims, args)


class AttentionBackward(torch.autograd.Function):
    """The Gradients of a Problem by a Backend, from do, dlse and what the forward saved."""

    @staticmethod
    def forward(problem, backend, needed, do, dlse, out, stats, *tensors):
        t = Tensors(*tensors)
        if t.k is not None:
            return tuple(backend.backward(problem, t, out, stats, do, dlse, needed))
        dqkv = torch.empty_like(t.q)
        needed = (needed[0],) * 3 + needed[3:]
        grads = backend.backward(problem, call.unpacked(t), out, stats, do, dlse, needed, into=call.unpack(dqkv))
        return dqkv, None, None, *grads[3:]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_second()

    jvp = staticmethod(refuse_jvp)

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(AttentionBackward.apply, info.batch_size, in_dims, args)
