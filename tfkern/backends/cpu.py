"""Attention on a CPU: by PyTorch's fused attention op and its backward where they can do it (cpu_fused.py), else by the tiles
of the backend eager.

Packed sequences and batches with key lengths are taken as dense groups (groups.py), small ones with key lengths by a mask.
"""

import dataclasses

import torch
from torch import Tensor

from tfkern import compat, cpu_fused, groups, layout
from tfkern.cpu_calls import mask_of, plan_of
from tfkern.eager_groups import backward_group, forward_group
from tfkern.groups import Group
from tfkern.problem import Gradients, Problem, Tensors

SMALL = 1 << 16  # scores of all heads, of which a mask that is not needed costs less than calls of their own
WORTH = 1 / 16  # the share of all keys that a mask must hide behind the last seen one to be worth a look at lengths


def unsupported(problem: Problem, needs_grad: bool) -> list[str]:
    """The reasons why it can't do the problem."""
    return [] if problem.device.type == "cpu" else ["it is for tensors on a CPU"]


def how(problem: Problem) -> str:
    """Which way it goes, for explain."""
    plan = plan_of(problem)
    if plan.refusal:
        return f"in tiles of PyTorch's operations: {plan.refusal}"
    if problem.packed or (problem.has_key_lengths and not _maskable(problem)):
        return "fused, sequences of equal lengths together"
    return "fused whole" if len(plan.calls) == 1 else f"fused in {len(plan.calls)} tiles"


@groups.without_autocast
def forward(problem: Problem, t: Tensors) -> tuple[Tensor, Tensor]:
    """out in q's memory order, stats (B, H, stats_rows, Nq) float32, or float64 for float64; B is 1 for packed sequences."""
    return groups.results(*_fitted(problem, t), _forward_group)


@groups.without_autocast
def output(problem: Problem, t: Tensors) -> Tensor:
    """out alone."""
    problem, t = _fitted(problem, t)
    plan = plan_of(problem)
    if plan.plain:
        call = plan.calls[0]
        mask = None if not plan.masked else t.mask if plan.boolean else mask_of(problem, t, call)
        q, k, v = cpu_fused.operands(problem, t[:3], call)
        if mask is not None and mask.requires_grad:  # else PyTorch would not take its fused op
            mask = mask.detach()
        out = compat.sdpa(q, k, v, mask, 0.0, call.causal, scale=problem.scale)
        if mask is None or cpu_fused.finite(out):
            return layout.like_order(out, t.q)
    return layout.like_order(groups.joined(problem, t, _forward_group)[0], t.q)


@groups.without_autocast
def backward(problem: Problem, t: Tensors, out, stats, do, dlse, needed, into=None) -> Gradients:
    """The needed gradients, those of q, k and v in the memory order of what they are the gradients of, or written into the
    three tensors given."""
    problem, t = _fitted(problem, t)

    def of_group(group: Group, do: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Gradients:
        plan, found = plan_of(group.problem), None
        if plan.refusal is None and dlse is None and not (needed[3] or needed[4]):
            found = cpu_fused.backward(group.problem, group.tensors, plan, out, lse, do, needed)
        return backward_group(group, do, dlse, needed) if found is None else found

    return groups.gradients(problem, t, needed, into, of_group, do, dlse, out, stats.select(2, 1))


def _forward_group(group: Group) -> tuple[Tensor, Tensor]:
    plan = plan_of(group.problem)
    found = None if plan.refusal else cpu_fused.forward(group.problem, group.tensors, plan)
    return forward_group(group) if found is None else found


def _maskable(p: Problem) -> bool:
    """Whether key lengths may as well be a mask."""
    shifted = p.lower_right and (p.left is not None or p.right is not None or p.has_slopes)  # by each length
    return _small(p) and p.mask is None and not shifted


def _small(p: Problem) -> bool:
    return p.batch * p.heads * p.n_q * p.n_k <= SMALL


def _fitted(p: Problem, t: Tensors) -> tuple[Problem, Tensors]:
    """The same problem, with a mask in the place of key lengths if it is small, and with key lengths where a mask of keys hides
    the last ones, if it is not."""
    if p.has_key_lengths and _maskable(p) and plan_of(p).refusal is None:
        masked, keys = _known(p, "masked", has_key_lengths=False, mask=(p.batch, 1, 1, p.n_k))
        return masked, t._replace(mask=(keys < t.key_lengths[:, None])[:, None, None], key_lengths=None)
    if p.mask is None or p.mask[1:3] != (1, 1) or p.mask[3] == 1 or _small(p):
        return p, t
    if p.has_key_lengths or p.packed or p.lower_right:
        return p, t
    short, keys = _known(p, "short", has_key_lengths=True)
    seen = t.mask[:, 0, 0]
    lengths = torch.where(seen, keys + 1, 0).amax(-1)
    if int(lengths.sum()) > (1 - WORTH) * seen.numel():
        return p, t
    if torch.equal(seen.sum(-1), lengths):  # nothing is hidden before the last seen key
        short, _ = _known(p, "shorter", has_key_lengths=True, mask=None)
        t = t._replace(mask=None)
    return short, t._replace(key_lengths=lengths.expand(p.batch).contiguous())


def _known(p: Problem, name: str, **changes) -> tuple[Problem, Tensor]:
    """The problem with changes, which it keeps, and the numbers of its keys."""
    if name not in p.plans:
        p.plans[name] = dataclasses.replace(p, **changes, plans={}), torch.arange(p.n_k, device="cpu")
    return p.plans[name]
