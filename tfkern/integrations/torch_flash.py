"""tfkern behind PyTorch's own hook: torch.nn.attention.activate_flash_attention_impl("tfkern").

Then the flash attention of PyTorch itself is tfkern's, on CUDA devices, whoever calls it: F.scaled_dot_product_attention where
it chooses that backend (float16 and bfloat16, no mask), TorchScript, the encoder layers' fused inference and nested tensors,
which do it in C++, and torch.nn.attention.varlen. Unlike the others to be had there, this one has dropout and ALiBi.
Importing tfkern makes the name known and activates nothing; torch.nn.attention.restore_flash_attention_impl() undoes it.

Below, as in ATen: lengths before heads, (B, N, H, D), or packed (total, H, D); a causal triangle and windows stand at the lower
right; rng_state holds the seed of dropout. The ops with "scaled_dot_product" in their names have heads before lengths.

Source: the schemas of ATen's flash attention ops, and PyTorch's documentation of that hook, 2.11 to 2.13.
"""

import warnings

import torch

from tfkern import backends, call, compat, dropout
from tfkern.integrations import flash_attn
from tfkern.options import Inputs, Options
from tfkern.problem import Gradients, Problem, Tensors, lse_of, stats_of

NAME = "tfkern"
_WANTED = (True, True, True) + (False,) * (len(Gradients._fields) - 3)  # dq, dk, dv


class _Handle:
    """What PyTorch's registry keeps, and removes to restore its own kernels."""

    def __init__(self, key: str):
        self._library = implement(key)

    def remove(self) -> None:
        self._library = None


def implement(key: str) -> torch.library.Library:
    """Register the ops for a dispatch key, for as long as what is returned lives."""
    library = torch.library.Library("aten", "IMPL", key)
    ops = {
        "_flash_attention_forward": _forward,
        "_flash_attention_forward_no_dropout_inplace": _forward_into,
        "_flash_attention_backward": _backward,
        "_scaled_dot_product_flash_attention": _sdpa_forward,
        "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # that kernels are replaced
        for name, function in ops.items():
            if hasattr(torch.ops.aten, name):  # the second is not in PyTorch 2.11
                library.impl(name, function, key)
    return library


def _understood(
    query, key, value, cum_seq_q, cum_seq_k, dropout_p, is_causal, scale, window_size_left, window_size_right, seqused_k=None,
    alibi_slopes=None,
) -> tuple[Problem, backends.Backend, Tensors]:  # fmt: skip
    """(problem, backend, tensors) of an op. Forward and backward are chosen alike, for a backend that can do both."""
    packed = cum_seq_q is not None
    if not packed:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    window = tuple(map(flash_attn.side, (window_size_left, window_size_right)))
    inputs = Inputs(query, key, value, None, alibi_slopes, None, seqused_k, cum_seq_q, cum_seq_k)
    options = Options(dropout_p, is_causal, scale, enable_gqa=True, causal_alignment="lower_right", window=window)
    problem = call.describe(inputs, options)
    return problem, backends.choose(problem, needs_grad=True), call.views(inputs, None)


def _refuse(query, key, value, return_debug_mask: bool, seqused_k, alibi_slopes, block_table) -> None:
    """NotImplementedError for what we haven't, and for what PyTorch would differentiate wrongly."""
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask must be False: tfkern never writes the weights out")
    if block_table is not None:
        raise NotImplementedError("block_table (paged keys and values) is not built yet; gather the pages into key and value")
    given = next((name for name, x in (("seqused_k", seqused_k), ("alibi_slopes", alibi_slopes)) if x is not None), None)
    if given and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise NotImplementedError(
            f"{given} must be None where gradients are wanted: PyTorch's backward wouldn't know of it; use tfkern.attention, "
            "or torch.no_grad()"
        )


def _forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    """(out, lse (B, H, Nq) or (H, total), rng_state, an unused one, an empty one). Keys are never split, whatever num_splits
    says; what max_q and max_k say the device knows."""
    _refuse(query, key, value, return_debug_mask, seqused_k, alibi_slopes, block_table)
    problem, backend, tensors = _understood(
        query, key, value, cum_seq_q, cum_seq_k, dropout_p, is_causal, scale, window_size_left, window_size_right, seqused_k,
        alibi_slopes,
    )  # fmt: skip
    if problem.dropout_p:
        tensors = tensors._replace(seed=dropout.draw_seed(query.device))
        rng_state = tensors.seed.view(torch.uint64)
    else:
        rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    out, stats = backend.forward(problem, tensors)
    lse = lse_of(stats, problem.unit(tensors))
    if problem.packed:
        out, lse = out.squeeze(0), lse.squeeze(0)
    unused, debug_mask = rng_state.new_zeros(()), query.new_empty(0)
    return out.transpose(-2, -3), lse, rng_state, unused, debug_mask


def _forward_into(out, *arguments, **options):
    """lse, and the result in `out`."""
    result, lse, *_ = _forward(*arguments, **options)
    out.copy_(result)
    return lse


def _backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
    scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """Gradients of query, key and value. Of the rows PyTorch hands on lse alone, so what that lost is lost here, as in
    PyTorch's own kernels: where logits are as large as 1e4, its rounding (2^-24 of it) is a relative error of the gradients."""
    problem, backend, tensors = _understood(
        query, key, value, cum_seq_q, cum_seq_k, dropout_p, is_causal, scale, window_size_left, window_size_right
    )
    if problem.dropout_p:
        tensors = tensors._replace(seed=rng_state.view(torch.int64))
    grad_out, out = (x.transpose(-2, -3) for x in (grad_out, out))
    if problem.packed:
        grad_out, out, logsumexp = (x.unsqueeze(0) for x in (grad_out, out, logsumexp))
    grads = backend.backward(problem, tensors, out, stats_of(logsumexp), grad_out, None, _WANTED)[:3]
    return tuple((x.squeeze(0) if problem.packed else x).transpose(-2, -3) for x in grads)


def _sdpa_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """out in query's memory order, lse, two Nones, lengths, and as _forward."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    lengths = query.shape[2], key.shape[2]
    out, lse, *state = _forward(q, k, v, None, None, *lengths, dropout_p, is_causal, return_debug_mask, scale=scale)
    return out.transpose(1, 2), lse, None, None, *lengths, *state


def _sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    """Gradients of query, key and value."""
    given = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = _backward(
        *given, logsumexp, None, None, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in grads)


if compat.register_flash is not None:
    compat.register_flash(NAME, register_fn=lambda: _Handle("CUDA"))
