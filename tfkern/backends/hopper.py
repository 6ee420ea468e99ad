"""The forward by the Gluon kernels for Hopper (kernels/hopper)."""

import torch
from torch import Tensor

from tfkern import features, launch, layout, tma
from tfkern.problem import Problem, Tensors
from tfkern.tiles import HOPPER, HOPPER_QUERIES, HopperConfig, HopperLoad, HopperTiles

SEVERAL = 128  # the largest head dim with which several features at once spill nothing in loops


def unsupported(problem: Problem) -> list[str]:
    """The reasons why this kernel can't do the problem here."""
    p, reasons = problem, launch.unsupported(problem.device)
    if not reasons and (arch := launch.architecture(p.device)) != "sm_90":
        reasons.append(f"runs on sm_90 (H100, H200), not on {arch}")
    return reasons + limits(p)


def limits(p: Problem) -> list[str]:
    """The reasons that no device could change."""
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
