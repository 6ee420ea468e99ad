"""The Gluon kernels for Hopper (kernels/hopper)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import features, launch, layout, tma
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
# Which of each kernel's descriptors come past its programs, in tiles of block_n rows; of the others a consumer owns its part.
STREAMED = {"flash_bwd_dq": (1, 2), "flash_bwd_dkdv": (0, 3)}


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
    elif (p.mask or p.bias) and _tiles(p)[1].masked is None:
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
    p, t = problem, features.plain_memory(problem, t)
    q, k, v = (tma.readable(x) for x in t[:3])
    key = "hopper", q.stride(), features.mask_vec(t)
    plan = p.plans.get(key)
    if plan is None:
        result = layout.Blank(q, p.v_head_dim)
        plan = p.plans[key] = _plan(p, result, features.mask_vec(t)), result
    launch_fwd, result = plan
    out = result.empty()
    stats = features.empty_stats(p)
    launch_fwd((q, k, v, out, out, stats), *features.of(p, t))
    return out, stats


def _plan(p: Problem, out: layout.Blank, mask_vec: int) -> launch.Launch:
    """All of the launch but its tensors."""
    from tfkern.kernels.hopper import flash_fwd, flash_fwd_short

    dim, config, short = _config(p)
    stride_o = tma.strides(out)
    mod = p.score_mod[0] if p.score_mod else None
    given = dict(MOD=mod, LINEAR=p.linear, MASK_VEC=mask_vec, HEAD_DIM=p.head_dim, **config.constants(dim))
    shape = (p.batch, p.heads, p.group, p.n_q, p.n_k)
    if short:
        kernel, items = flash_fwd_short.flash_fwd_short, p.batch * p.kv_heads
        numbers = (stride_o, *shape, -(-p.n_q // HOPPER_QUERIES), items, p.scale, int(p.lower_right), p.right)
    else:
        rows = HOPPER_QUERIES * config.consumers
        # of all queries of a head, or for packed sequences as many as they may need at most (kernels/sequence.py)
        tiles = p.n_q // rows + p.batch + 1 if p.packed else -(-p.n_q // rows)
        kernel, items = flash_fwd.flash_fwd, (1 if p.packed else p.batch) * p.heads * tiles
        numbers = (stride_o, *shape, tiles, items, p.scale, int(p.lower_right), p.left, p.right)
    constants = {key: given[key] for key in kernel.arg_names if key in given}  # in the kernel's order
    programs = min(items, launch.multiprocessors(p.device) * config.programs)
    blocks = tuple((rows, dim) for rows in (HOPPER_QUERIES, config.block_n, config.block_n, HOPPER_QUERIES))
    return launch.Launch(kernel, programs, p.device, numbers, constants, config.options(), blocks)


def _tiles(p: Problem) -> tuple[int, HopperTiles]:
    """(head-dim class, its tiles)."""
    dim = min(d for d in HOPPER if p.head_dim <= d)
    return dim, HOPPER[dim]


def _config(p: Problem) -> tuple[int, HopperConfig, bool]:
    """(head-dim class, those of its tiles that fit the problem, whether they are flash_fwd_short's)."""
    dim, tiles = _tiles(p)
    if p.mask or p.bias:
        return dim, tiles.masked, False
    if p.n_q <= HOPPER_QUERIES:
        return dim, tiles.single, False
    load = HopperLoad(p.batch * p.heads, p.group, p.n_q, p.n_k, p.right is not None, launch.multiprocessors(p.device))
    # Dropout, and several features, spill in three consumers that keep K and V.
    resident = not (p.packed or p.left is not None or p.dropout_p or p.several)
    return dim, *tiles.fastest(load, p.heavy, p.several, resident)


class Plan(NamedTuple):
    """The launches of a backward: one for all, or one for dq and, if they are needed, another for dk and dv."""

    one_pass: launch.Launch | None = None
    dq: launch.Launch | None = None
    dkdv: launch.Launch | None = None


def backward(problem: Problem, t: Tensors, out, stats, do, dlse, needed, into=None) -> Gradients:
    """As portable.backward. In one launch where that fits; of two, that for dQ runs for any gradient, as delta comes of it."""
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
            dkdv = _plan_one_of_two(p, "flash_bwd_dkdv", tuple(strides)) if of_keys else None
            plan = Plan(None, _plan_one_of_two(p, "flash_bwd_dq", (stride_dq,)), dkdv)
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


def _plan_one_of_two(p: Problem, name: str, strides: tuple) -> launch.Launch:
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
