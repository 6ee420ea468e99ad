"""The autograd Function and its backward, itself a Function, so that higher derivatives have a place to come to."""

import torch
from torch import Tensor


def attention(query, key, value, key_lengths, problem, backend) -> tuple[Tensor, Tensor]:
    """(out, lse) of one problem by one backend, differentiable in query, key and value."""
    return Attention.apply(query, key, value, key_lengths, problem, backend)


class Attention(torch.autograd.Function):
    """out, lse = attention(q, k, v)."""

    @staticmethod
    def forward(q, k, v, key_lengths, problem, backend):
        return backend.forward(problem, q, k, v, key_lengths)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.problem, ctx.backend = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, key_lengths, out, lse = ctx.saved_tensors
        if do is None and dlse is None:
            return (None,) * 6
        if do is None:
            do = torch.zeros_like(out)
        needed = ctx.needs_input_grad[:3]
        grads = AttentionBackward.apply(do, dlse, q, k, v, key_lengths, out, lse, ctx.problem, ctx.backend, needed)
        return *grads, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("forward-mode derivatives (jvp) of tfkern.attention are not built yet; use reverse mode")

    @staticmethod
    def vmap(info, in_dims, *args):
        raise NotImplementedError("torch.vmap over tfkern.attention is not built yet; fold the mapped dimension into the batch")


class AttentionBackward(torch.autograd.Function):
    """dq, dk, dv from do, dlse and what the forward saved."""

    @staticmethod
    def forward(do, dlse, q, k, v, key_lengths, out, lse, problem, backend, needed):
        return backend.backward(problem, needed, do, dlse, q, k, v, key_lengths, out, lse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "second derivatives of tfkern.attention are not built yet; tfkern.reference.attention has them"
        )

    jvp = Attention.jvp
    vmap = Attention.vmap
