"""The backward by the Gluon kernels for Hopper (kernels/hopper)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import features, launch, layout, tma
from tfkern.problem import Gradients, Problem, Tensors
from tfkern.tiles import (
    HOPPER_BACKWARD,
    HOPPER_FULL_CHIP,
    HOPPER_ONE_PASS,
    HOPPER_ONE_PASS_SPILLS,
    HOPPER_QUERIES,
    HopperOnePass,
)

# Which of each kernel's descriptors come past its programs, in tiles of block_n rows; of the others a consumer owns its part.
STREAMED = {"flash_bwd_dq": (1, 2), "flash_bwd_dkdv": (0, 3)}


def limits(p: Problem) -> list[str]:
    """The reasons why another backend must do the backward of what the forward can do."""
    there = {
        "a mask": p.mask, "an additive mask": p.bias,
        "head dims beyond 128": p.head_dim > max(HOPPER_BACKWARD["flash_bwd_dq"]),
        "several of dropout, softcap, ALiBi and score_mod": p.several,  # they spill
    }  # fmt: skip
    return [f"{name}: not in the backward's kernels" for name, given in there.items() if given]


class Plan(NamedTuple):
    """The launches of a backward: one for all, or one for dq and, if they are needed, another for dk and dv."""

    one_pass: launch.Launch | None = None
    dq: launch.Launch | None = None
    dkdv: launch.Launch | None = None


def backward(problem: Problem, t: Tensors, out, stats, do, dlse, needed, into=None) -> Gradients:
    """As portable.backward, within `limits`. In one launch where that fits; of two, that for dQ runs for any gradient, as delta
    comes of it."""
    p, t, need = problem, features.plain_memory(problem, t), Gradients(*needed)
    q, k, v, out, do = (tma.readable(x) for x in (*t[:3], out, do))
    dlse = None if dlse is None else dlse.resolve_neg().contiguous()
    wanted = into or _results(p, t)
    dq, dk, dv = (x if tma.ready(x) else torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted)
    dslopes, delta = features.empty_rows(p) if need.slopes else None, None
    plan = _planned(p, (dq, dk, dv), need, dlse is None)
    optional = features.of(p, t)
    if plan.one_pass is not None:
        plan.one_pass((q, k, v, out, do, dq, dk, dv, stats, dlse), *optional)
    else:
        delta = features.empty_rows(p)
        plan.dq((q, k, v, out, do, dq, dq, stats, dlse, delta, dslopes), *optional)
        if plan.dkdv is not None:
            plan.dkdv((q, k, v, do, dk, dv, dk, dv, stats, delta), *optional)
        else:
            dk = dv = None
    made = zip((dq, dk, dv), wanted, strict=True)
    return Gradients(
        *(x if x is None or x is there else there.copy_(x) for x, there in made), None,
        features.slope_sums(p, t, dslopes) if need.slopes else None,
        features.sink_sums(t.sinks, stats, delta) if need.sinks else None,
    )  # fmt: skip


def _results(p: Problem, t: Tensors) -> tuple[Tensor, ...]:
    """Memory for dq, dk and dv, in the order of q, k and v."""
    key = "results", *(x.stride() for x in t[:3])
    blanks = p.plans.get(key)
    if blanks is None:
        blanks = p.plans[key] = tuple(layout.Blank(x, x.shape[-1]) for x in t[:3])
    return tuple(x.empty() for x in blanks)


def _planned(p: Problem, results: tuple[Tensor, ...], need: Gradients, without_dlse: bool) -> Plan:
    """The launches, worked out once."""
    of_keys = need.k or need.v
    key = "backward", of_keys, without_dlse, need.slopes, *(x.stride() for x in results)
    plan = p.plans.get(key)
    if plan is None:
        if of_keys and (config := one_pass(p)):
            plan = Plan(_plan_one_pass(p, config))
        else:
            stride_dq, *strides = map(tma.strides, results)
            dkdv = _plan(p, "flash_bwd_dkdv", tuple(strides)) if of_keys else None
            plan = Plan(None, _plan(p, "flash_bwd_dq", (stride_dq,)), dkdv)
        p.plans[key] = plan
    return plan


def one_pass(p: Problem) -> HopperOnePass | None:
    """The tiles of the backward in one launch, if it has memory for all queries of a key head; None too for what its kernel
    does not have. On a chip also None where there are fewer key heads than fill it, which two kernels divide further, and with
    a Triton that spills in its loops."""
    if p.packed or p.heavy or p.has_sinks:
        return None
    few = p.batch * p.kv_heads < HOPPER_FULL_CHIP
    if (few or launch.triton_version() >= HOPPER_ONE_PASS_SPILLS) and launch.architecture(p.device) != "interpreter":
        return None
    tiles = p.group * -(-p.n_q // HOPPER_QUERIES)
    fitting = (config for dim in HOPPER_ONE_PASS if p.head_dim <= dim for config in HOPPER_ONE_PASS[dim])
    return next((config for config in fitting if tiles <= config.tiles), None)


def _plan_one_pass(p: Problem, config: HopperOnePass) -> launch.Launch:
    """All of the one launch but its tensors."""
    from tfkern.kernels.hopper import flash_bwd

    dim = min(d for d in HOPPER_ONE_PASS if p.head_dim <= d)
    items = p.batch * p.kv_heads
    sizes = (p.heads, p.group, p.n_q, p.n_k, -(-p.n_q // HOPPER_QUERIES), items)
    numbers = (*sizes, p.scale, int(p.lower_right), p.left, p.right)
    programs = min(items, launch.multiprocessors(p.device))
    blocks = ((HOPPER_QUERIES, dim),) * 8
    return launch.Launch(flash_bwd.flash_bwd, programs, p.device, numbers, config.constants(dim), config.options(), blocks)


def _plan(p: Problem, name: str, strides: tuple) -> launch.Launch:
    """All of one of two launches but its tensors; `strides` are those of what it may write without TMA."""
    from tfkern.kernels.hopper import flash_bwd_dkdv, flash_bwd_dq

    kernel = {"flash_bwd_dq": flash_bwd_dq.flash_bwd_dq, "flash_bwd_dkdv": flash_bwd_dkdv.flash_bwd_dkdv}[name]
    of_keys = name == "flash_bwd_dkdv"
    dim = min(d for d in HOPPER_BACKWARD[name] if p.head_dim <= d)
    found = HOPPER_BACKWARD[name][dim]
    heads, rows = (p.kv_heads, p.n_k) if of_keys else (p.heads, p.n_q)
    config = found.heavy if p.heavy else found.single if rows <= HOPPER_QUERIES else found.usual
    owned = HOPPER_QUERIES * config.consumers
    # of all rows of a head, or for packed sequences as many as they may need at most (kernels/sequence.py)
    tiles = rows // owned + p.batch + 1 if p.packed else -(-rows // owned)
    sizes = (p.batch, p.heads, p.group, p.n_q, p.n_k, tiles)
    numbers = (*strides, *sizes, p.scale, int(p.lower_right), p.left, p.right)
    value, derivative = p.score_mod or (None, None)
    given = dict(MOD=value, MOD_GRAD=derivative, LINEAR=p.linear, HEAD_DIM=p.head_dim, **config.constants(dim, of_keys))
    constants = {key: given[key] for key in kernel.arg_names if key in given}  # in the kernel's order
    blocks = tuple((config.block_n if i in STREAMED[name] else HOPPER_QUERIES, dim) for i in range(6))
    grid = (1 if p.packed else p.batch) * heads * tiles
    return launch.Launch(kernel, grid, p.device, numbers, constants, config.options(), blocks)
