"""The Gluon kernels for Hopper (kernels/hopper)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import features, launch, planner, tma
from tfkern.layout import Blank
from tfkern.problem import Gradients, Problem, Tensors
from tfkern.tiles import (
    HOPPER,
    HOPPER_BACKWARD,
    HOPPER_FULL_CHIP,
    HOPPER_ONE_PASS,
    HOPPER_ONE_PASS_SPILLS,
    HOPPER_QUERIES,
    HopperConfig,
    HopperLoad,
    HopperOnePass,
    HopperTiles,
)

SEVERAL = 128  # the largest head dim with which several features at once spill nothing in loops


def unsupported(problem: Problem, needs_grad: bool) -> list[str]:
    """The reasons why these kernels can't do the problem here; needs_grad: its backward too."""
    p, reasons = problem, launch.unsupported(problem.device)
    if not reasons and (arch := launch.architecture(p.device)) != "sm_90":
        reasons.append(f"runs on sm_90 (H100, H200), not on {arch}")
    return reasons + limits(p) + (backward_limits(p) if needs_grad else [])


def limits(p: Problem) -> list[str]:
    """What the forward does not take, whatever the device."""
    reasons = []
    if p.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"takes float16 and bfloat16, not {p.dtype}")
    if p.head_dim != p.v_head_dim or p.head_dim % tma.ALIGNED or not 0 < p.head_dim <= max(HOPPER):
        reasons.append(
            f"head dims must be equal multiples of {tma.ALIGNED} up to {max(HOPPER)}, not {p.head_dim}, {p.v_head_dim}"
        )
    elif (p.mask or p.bias) and _tiles(p).masked is None:
        reasons.append(f"a mask takes too many registers with head dim {p.head_dim}")
    elif p.several and p.head_dim > SEVERAL:
        reasons.append(f"several of dropout, softcap, ALiBi and score_mod take too many registers with head dim {p.head_dim}")
    if p.stats_rows > 2:
        reasons.append("precise_delta is not built in")
    if p.scale is None or not p.scale > 0:
        reasons.append("scale must be a number > 0")
    if 0 in (p.batch, p.heads, p.n_q, p.n_k):
        reasons.append("nothing to do: TMA has no empty tensors")
    return reasons


def backward_limits(p: Problem) -> list[str]:
    """What the forward takes and the backward does not, whatever the device."""
    there = {
        "a mask": p.mask, "an additive mask": p.bias,
        f"head dims beyond {max(HOPPER_BACKWARD['flash_bwd_dq'])}": p.head_dim > max(HOPPER_BACKWARD["flash_bwd_dq"]),
        "several of dropout, softcap, ALiBi and score_mod": p.several,  # they spill
    }  # fmt: skip
    return [f"the backward does not take {name}, the forward does" for name, given in there.items() if given]


def forward(problem: Problem, t: Tensors) -> tuple[Tensor, Tensor]:
    """out in q's memory order, stats (B, H, 2, Nq) float32 (problem.py); B is 1 for packed sequences."""
    p, t = problem, _readable(features.plain_memory(problem, t))
    flash_fwd, *results = planner.once(p, _plan_forward, t)
    out, stats = (x.empty() for x in results)
    flash_fwd(*features.of(p, t), Q=t.q, K=t.k, V=t.v, O=out, STATS=stats)
    return out, stats


def _readable(t: Tensors) -> Tensors:
    """Queries, keys and values as TMA can read them."""
    if all(map(tma.ready, t[:3])):
        return t
    return Tensors(*map(tma.readable, t[:3]), *t[3:])


def _plan_forward(p: Problem, t: Tensors) -> tuple[launch.Launch, Blank, Blank]:
    """The launch, and what out and stats are to be."""
    out, stats = Blank.in_order_of(t.q, p.v_head_dim), features.stats(p)
    config, short = _config(p)
    tensors = dict(Q=t.q, K=t.k, V=t.v, O=out, STATS=stats)
    return planner.plan(f"hopper.flash_fwd{'_short' * short}", p, features.mask_of(t), tensors, config), out, stats


def _tiles(p: Problem) -> HopperTiles:
    """Those of its head-dim class."""
    return HOPPER[min(d for d in HOPPER if p.head_dim <= d)]


def _config(p: Problem) -> tuple[HopperConfig, bool]:
    """(the tiles that fit the problem, whether they are flash_fwd_short's)."""
    tiles = _tiles(p)
    if p.mask or p.bias:
        return tiles.masked, False
    if p.n_q <= HOPPER_QUERIES:
        return tiles.single, False
    load = HopperLoad(p.batch * p.heads, p.group, p.n_q, p.n_k, p.right is not None, launch.multiprocessors(p.device))
    # Dropout, and several features, spill in three consumers that keep K and V.
    resident = not (p.packed or p.left is not None or p.dropout_p or p.several)
    return tiles.fastest(load, p.heavy, p.several, resident)


def backward(problem: Problem, t: Tensors, out, stats, do, dlse, needed, into=None) -> Gradients:
    """As portable.backward. In one launch where that fits; of two, that for dQ runs for any gradient, as delta comes of it."""
    p, t, need = problem, _readable(features.plain_memory(problem, t)), Gradients(*needed)
    out, do = tma.readable(out), tma.readable(do)
    dlse = None if dlse is None else dlse.resolve_neg().contiguous()
    made = into and tuple(map(_writable, into))
    plan = planner.once(p, _plan_backward, t, out, do, dlse, need, *(made or (None, None, None)))
    dq, dk, dv = made or (x.empty() for x in plan.results)
    delta, dslopes = None, plan.rows.empty() if need.slopes else None
    optional = features.of(p, t)
    given = dict(Q=t.q, K=t.k, V=t.v, DO=do, STATS=stats)
    if plan.one_pass is not None:
        plan.one_pass(*optional, **given, O=out, DLSE=dlse, DQ=dq, DK=dk, DV=dv)
    else:
        delta = plan.rows.empty()
        plan.dq(*optional, **given, O=out, DLSE=dlse, DELTA=delta, DQ=dq, DSLOPES=dslopes)
        if plan.dkdv is not None:
            plan.dkdv(*optional, **given, DELTA=delta, DK=dk, DV=dv)
        else:
            dk = dv = None
    if into:
        dq, dk, dv = (x if x is None or x is y else y.copy_(x) for x, y in zip((dq, dk, dv), into, strict=True))
    return Gradients(
        dq, dk, dv, None, features.slope_sums(p, t, dslopes) if need.slopes else None,
        features.sink_sums(t.sinks, stats, delta) if need.sinks else None,
    )  # fmt: skip


def _writable(x: Tensor) -> Tensor:
    """The tensor, or another one where TMA can't write it in place."""
    return x if tma.ready(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


class BackwardPlan(NamedTuple):
    """The launches of a backward: one for all, or one for dq and, if they are needed, another for dk and dv; what dq, dk and dv
    are to be, and what a number for each query."""

    one_pass: launch.Launch | None
    dq: launch.Launch | None
    dkdv: launch.Launch | None
    results: tuple[Blank, Blank, Blank]
    rows: Blank


def _plan_backward(p: Problem, t: Tensors, out, do, dlse, need: Gradients, *into) -> BackwardPlan:
    rows, of_keys = features.rows(p), need.k or need.v
    results = tuple(Blank.in_order_of(x, x.shape[-1]) for x in t[:3])
    dq, dk, dv = results if into[0] is None else into
    given = dict(Q=t.q, K=t.k, V=t.v, DO=do, STATS=features.stats(p))
    if of_keys and (config := one_pass(p)):
        tensors = given | dict(O=out, DLSE=dlse, DQ=dq, DK=dk, DV=dv)
        return BackwardPlan(planner.plan("hopper.flash_bwd", p, None, tensors, config), None, None, results, rows)
    tensors = given | dict(O=out, DLSE=dlse, DELTA=rows, DQ=dq, DSLOPES=rows if need.slopes else None)
    dq, dkdv = planner.plan("hopper.flash_bwd_dq", p, None, tensors, _of_two("flash_bwd_dq", p)), None
    if of_keys:
        tensors = given | dict(DELTA=rows, DK=dk, DV=dv)
        dkdv = planner.plan("hopper.flash_bwd_dkdv", p, None, tensors, _of_two("flash_bwd_dkdv", p))
    return BackwardPlan(None, dq, dkdv, results, rows)


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


def _of_two(kernel: str, p: Problem) -> HopperConfig:
    """The tiles of one of two launches."""
    table = HOPPER_BACKWARD[kernel]
    tiles = table[min(d for d in table if p.head_dim <= d)]
    rows = p.n_k if kernel == "flash_bwd_dkdv" else p.n_q
    return tiles.heavy if p.heavy else tiles.single if rows <= HOPPER_QUERIES else tiles.usual
