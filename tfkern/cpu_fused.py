"""A dense problem by PyTorch's fused CPU attention and its backward, in the calls of cpu_calls.py.

Sinks, which the op does not know, follow from its lse, and so does an lse of -inf for rows that see no key. Some values make
the op wrong; then the functions here return None, and the caller uses tiles of PyTorch's operations. These values are NaN or
inf in hidden keys, which pass through a mask that is added, and in the backward an lse so large that float32 can't hold the
log of the sum beside it.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tfkern import compat, layout
from tfkern.cpu_calls import Call, Plan, beyond_the_edge, mask_of
from tfkern.problem import Gradients, Problem, Tensors

# The number of keys of a call up to which the op's backward is faster in float32, copies included (measured: half the time
# at 128 keys, on a CPU with instructions for bfloat16). In float16 it was always faster; the limit bounds the memory of the
# copies.
WIDE = {torch.bfloat16: 256, torch.float16: 2048}


def forward(p: Problem, t: Tensors, plan: Plan) -> tuple[Tensor, Tensor] | None:
    """out (B, H, Nq, Dv) in any memory order and lse (B, H, Nq); None where the op would be wrong."""
    out, lse = _forward(p, t, plan, t[:3])
    if plan.masked and not finite(out):
        if (qkv := _without_unseen(p, t)) is None:
            return None
        out, lse = _forward(p, t, plan, qkv)
        if not finite(out):
            return None
    return (out, lse) if t.sinks is None else _beside_sinks(t.sinks, out, lse)


def _forward(p: Problem, t: Tensors, plan: Plan, qkv) -> tuple[Tensor, Tensor]:
    if plan.whole:
        return _forward_call(p, t, qkv, plan.calls[0], {})
    out = layout.empty_in_order_of(t.q, p.v_head_dim).zero_()
    lse = torch.full(t.q.shape[:3], -math.inf, dtype=p.lse_dtype, device="cpu")
    if plan.joined and p.dtype != p.lse_dtype:
        out = out.to(p.lse_dtype)
    made: dict = {}
    for call in plan.calls:
        part, part_lse = _forward_call(p, t, qkv, call, made)
        place = slice(None), slice(None), call.rows
        if plan.joined:
            _join(out[place], lse[place], part, part_lse)
        else:
            out[place], lse[place] = part, part_lse
    return out.to(p.dtype), lse


def _join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge the result for further keys (part, part_lse) into out and lse, in place."""
    both = torch.logaddexp(lse, part_lse)
    share, part_share = ((x - both).masked_fill_(both == -math.inf, 0.0).exp_()[..., None] for x in (lse, part_lse))
    out.mul_(share).add_(part * part_share)
    lse.copy_(both)


def _forward_call(p: Problem, t: Tensors, qkv, call: Call, made: dict) -> tuple[Tensor, Tensor]:
    mask = mask_of(p, t, call, made)
    out, lse = compat.flash(*operands(p, qkv, call), 0.0, call.causal, attn_mask=mask, scale=p.scale)
    if p.v_head_dim < p.head_dim:
        out = out[..., : p.v_head_dim]
    if mask is not None and int(lse.count_nonzero()) < lse.numel():  # the op returns an lse of 0 for rows that see no key
        if call.causal:
            mask = mask + mask.new_full((lse.shape[2], call.keys.stop - call.keys.start), -math.inf).triu(1)
        lse = lse.masked_fill((mask == -math.inf).all(-1), -math.inf)
    more = beyond_the_edge(p, t, call)
    return out, lse if more is None else lse + more


def backward(p: Problem, t: Tensors, plan: Plan, out: Tensor, lse: Tensor, do: Tensor, needed) -> Gradients | None:
    """The needed gradients of q, k, v (in any memory order) and sinks; None where the op would be wrong."""
    if not exact_enough(lse, p.dtype):
        return None
    qkv, hiding = t[:3], plan.masked or any(call.causal for call in plan.calls)
    if hiding and not all(map(finite, (*qkv, do))):
        if (qkv := _without_unseen(p, t)) is None:
            return None
        do = do.masked_fill(~_seen(p, t).any(3, keepdim=True), 0.0)
        if not all(map(finite, (*qkv, do))):
            return None
    dsinks = None
    if needed[5]:  # delta = sum of O * dO
        if not finite(do):
            return None
        delta = torch.linalg.vecdot(do.to(lse.dtype), out.to(lse.dtype))
        dsinks = -((t.sinks[:, None] - lse).exp_() * delta).sum((0, 2))
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # -inf - -inf would be NaN
    found = _backward(p, t, plan, qkv, do, out, lse)
    return Gradients(*(x if need else None for x, need in zip(found, needed, strict=False)), sinks=dsinks)


def _backward(p: Problem, t: Tensors, plan: Plan, qkv, do: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    """The gradients of q, k and v. Several calls are summed in the wide dtype."""
    do, out = (_padded(x, max(p.head_dim, p.v_head_dim)) for x in (do, out))
    sums = None if plan.exact else [torch.zeros_like(x, dtype=lse.dtype) for x in t[:3]]
    made: dict = {}
    for call in plan.calls:
        place = slice(None), slice(None), call.rows
        more = beyond_the_edge(p, t, call)
        own_lse = lse[place] if more is None else lse[place] - more
        own, mask = (do[place], *operands(p, qkv, call), out[place]), mask_of(p, t, call, made)
        if call.keys.stop - call.keys.start <= WIDE.get(p.dtype, 0):
            own, mask = (x.to(lse.dtype) for x in own), None if mask is None else mask.to(lse.dtype)
        own, own_lse, mask = _heads_as_batch(p, (*own, own_lse), mask)
        found = compat.flash_backward(*own, own_lse, 0.0, call.causal, attn_mask=mask, scale=p.scale)
        found = [x.view(p.batch, -1, *x.shape[2:]) for x in found]
        found = [x[..., : like.shape[-1]] for x, like in zip(found, t, strict=False)]
        if sums is None:
            return found
        for x, at, part in zip(sums, (call.rows, call.keys, call.keys), found, strict=True):
            x[:, :, at] += part
    return sums


def _heads_as_batch(p: Problem, rows, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """(do, q, k, v, out), lse and mask as B * H sequences of one head, where q has its heads outside of its rows in memory. The
    op's backward returns gradients whose heads lie within the rows, which would have to be copied."""
    shared = mask is None or mask.shape[:2] == (1, 1)
    if p.group == 1 and p.heads > 1 and rows[1].stride(1) > rows[1].stride(2) and (shared or p.batch == 1):
        rows = [x.reshape(p.batch * p.heads, 1, *x.shape[2:]) for x in rows]
        mask = mask if shared else mask.transpose(0, 1)
    return tuple(rows[:5]), rows[5], mask


def operands(p: Problem, qkv, call: Call) -> tuple[Tensor, ...]:
    """q, k and v of a call as the op takes them: with equal head dims, dense in the last dim. (It reads past the end
    otherwise.)"""
    q, k, v = qkv
    if call.rows != slice(0, p.n_q):
        q = q[:, :, call.rows]
    if call.keys != slice(0, p.n_k):
        k, v = k[:, :, call.keys], v[:, :, call.keys]
    if p.head_dim == p.v_head_dim and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return q, k, v
    return tuple(_padded(x, max(p.head_dim, p.v_head_dim)) for x in (q, k, v))


def _padded(x: Tensor, dim: int) -> Tensor:
    return layout.last_dim_dense(x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])))


def finite(x: Tensor) -> bool:
    """Whether x has no NaN and no inf. False as well where its sum overflows."""
    return math.isfinite(x.sum(dtype=torch.float32 if x.dtype.itemsize < 4 else None).item())


def _without_unseen(p: Problem, t: Tensors) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v with 0 in queries that see no key and keys that no query sees, by mask and bias; None without those."""
    if not (p.mask or p.bias):
        return None
    seen = _seen(p, t)
    unseen = ~seen.any(2).expand(p.batch, p.heads, p.n_k).unflatten(1, (p.kv_heads, p.group)).any(2)[..., None]
    return t.q.masked_fill(~seen.any(3, keepdim=True), 0.0), t.k.masked_fill(unseen, 0.0), t.v.masked_fill(unseen, 0.0)


def _seen(p: Problem, t: Tensors) -> Tensor:
    """Where mask and bias let a query see a key, (B or 1, H or 1, Nq or 1, Nk)."""
    seen = torch.ones(1, 1, 1, p.n_k, dtype=torch.bool, device="cpu")
    seen = seen if t.mask is None else seen & t.mask
    return seen if t.bias is None else seen & (t.bias != -math.inf)


def exact_enough(lse: Tensor, dtype: torch.dtype) -> bool:
    """Whether the rounding of lse, from which the op's backward takes weights, costs less than the rounding of results of that
    dtype, or no more than a float32 sum of a few numbers. An lse of -inf, of a row that sees no key, does not count."""
    largest = max(64.0, torch.finfo(dtype).eps * 2**20) if lse.dtype == torch.float32 else 2.0**30
    if not lse.numel():
        return True
    least, most = (x.item() for x in lse.aminmax())
    if least == -math.inf:
        least, most = (x.item() for x in lse.masked_fill(lse == -math.inf, 0.0).aminmax())
    return -largest <= least and most <= largest  # False for NaN


def _beside_sinks(sinks: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor] | None:
    """out and lse with the sinks' share. None where an lse or a sink is too large to compute the share."""
    both = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    if not exact_enough(both, out.dtype):  # (an lse far below that is nothing beside it)
        return None
    return out.mul_((lse - both).masked_fill_(both == -math.inf, 0.0).exp_()[..., None]), both
