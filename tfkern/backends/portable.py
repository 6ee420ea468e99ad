"""The portable Triton kernels (kernels/flash_*.py): any GPU that Triton compiles for, or the interpreter."""

from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import configs, features, launch, layout, planner, tma
from tfkern.layout import Blank
from tfkern.problem import Gradients, Problem, Tensors


def unsupported(problem: Problem, needs_grad: bool) -> list[str]:
    """The reasons why these kernels can't do the problem here."""
    reasons = launch.unsupported(problem.device)
    if problem.dtype == torch.float64:
        reasons.append("float64 has no fused kernel")
    for name, dim in (("head dim", problem.head_dim), ("value head dim", problem.v_head_dim)):
        if not 0 <= dim <= 256:
            reasons.append(f"{name} {dim} is outside 0..256")
    return reasons


def forward(problem: Problem, t: Tensors) -> tuple[Tensor, Tensor]:
    """out in q's memory order, stats (B, H, stats_rows, Nq) float32 (problem.py); B is 1 for packed sequences."""
    p, t = problem, features.plain_memory(problem, t)
    flash_fwd, *results = planner.once(p, _plan_forward, t)
    out, stats = (x.empty() for x in results)
    flash_fwd(*features.of(p, t), Q=t.q, K=t.k, V=t.v, O=out, STATS=stats)
    return out, stats


def _plan_forward(p: Problem, t: Tensors) -> tuple[launch.Launch, Blank, Blank]:
    """The launch, and what out and stats are to be."""
    out, stats = Blank.in_order_of(t.q, p.v_head_dim), features.stats(p)
    tensors = dict(Q=t.q, K=t.k, V=t.v, O=out, STATS=stats)
    return planner.plan("flash_fwd", p, features.mask_of(t), tensors), out, stats


def backward(problem: Problem, t: Tensors, out, stats, do, dlse, needed, into=None) -> Gradients:
    """The needed gradients, those of q, k and v in the memory order of what they are the gradients of, or written into the
    three tensors given."""
    p, t, need = problem, features.plain_memory(problem, t), Gradients(*needed)
    do = layout.last_dim_dense(do.resolve_neg())
    dlse = None if dlse is None else dlse.resolve_neg().contiguous()
    aligned = (t.q.data_ptr() | do.data_ptr()) % launch.ALIGNMENT == 0
    plan = planner.once(p, _plan_backward, t, out, do, dlse, need, aligned, *(into or (None, None, None)))
    dq, dk, dv = into or (x.empty() for x in plan.results)
    delta = plan.rows.empty()
    dslopes = plan.rows.empty() if need.slopes else None
    optional = features.of(p, t)
    given = dict(Q=t.q, K=t.k, V=t.v, DO=do, STATS=stats, DELTA=delta)
    if plan.dq is None:
        plan.dkdv(*optional, **given, DLSE=dlse, DQ=dq, DK=dk, DV=dv, DSLOPES=dslopes)
    else:
        # delta and, where slopes need a gradient, each query's part of it, come of this one: any gradient needs it
        plan.dq(*optional, **given, O=out, DLSE=dlse, DQ=dq, DSLOPES=dslopes)
        if need.k or need.v:
            plan.dkdv(*optional, **given, DLSE=None, DQ=None, DK=dk, DV=dv, DSLOPES=None)
    dbias = None
    if need.bias:
        dbias = torch.empty(p.bias, dtype=t.bias.dtype, device=p.device)
        plan.dbias(*optional, **given, DBIAS=dbias)
    return Gradients(
        dq, *((dk, dv) if need.k or need.v else (None, None)), dbias,
        features.slope_sums(p, t, dslopes) if need.slopes else None,
        features.sink_sums(t.sinks, stats, delta) if need.sinks else None,
    )  # fmt: skip


class BackwardPlan(NamedTuple):
    """The launches of a backward, what dq, dk and dv are to be, and what a number for each query. Without dq, dkdv makes all
    three in one pass."""

    dq: launch.Launch | None
    dkdv: launch.Launch
    dbias: launch.Launch | None
    results: tuple[Blank, Blank, Blank]
    rows: Blank


def _plan_backward(p: Problem, t: Tensors, out, do, dlse, need: Gradients, aligned: bool, *into) -> BackwardPlan:
    mask, rows = features.mask_of(t), features.rows(p)
    results = tuple(Blank.in_order_of(x, x.shape[-1]) for x in t[:3])
    dq, dk, dv = results if into[0] is None else into
    given = dict(Q=t.q, K=t.k, V=t.v, DO=do, STATS=features.stats(p), DELTA=rows)
    of_queries = dict(DLSE=dlse, DQ=dq, DSLOPES=rows if need.slopes else None)
    of_keys = dict(DK=dk, DV=dv)
    dq, one_pass = None, _one_pass(p, t.q, t.k, t.v, do, dq, dk, dv)
    if one_pass is not None:
        dkdv = planner.plan("flash_bwd_dkdv", p, mask, given | of_queries | of_keys, one_pass)
    else:
        dq = planner.plan("flash_bwd_dq", p, mask, given | of_queries | dict(O=out))
        config = _described(p, t, do, aligned)
        tensors = given | dict.fromkeys(of_queries) | of_keys
        dkdv = planner.plan("flash_bwd_dkdv", p, mask, tensors, config, ("Q", "DO") if config else ())
    dbias = planner.plan("flash_bwd_dbias", p, mask, given | dict(DBIAS=t.bias)) if need.bias else None
    return BackwardPlan(dq, dkdv, dbias, results, rows)


def _one_pass(p: Problem, *tensors) -> configs.TileConfig | None:
    """The tiles of a backward in one pass, if it is taken."""
    if p.packed or layout.kernel_strides(*tensors)[0] == 0:
        return None  # nobody knows the longest packed sequence; free strides take too many registers
    arch, programs = launch.architecture(p.device), p.batch * p.kv_heads
    return configs.one_pass(arch, p.dtype.itemsize, planner.head_dim_class(p), p.n_k, programs, p.heavy)


def _described(p: Problem, t: Tensors, do, aligned: bool) -> configs.TileConfig | None:
    """The tiles of dK and dV by themselves where TMA brings queries and their gradients. It cuts tiles where a tensor ends, not
    where a window or a packed sequence does, nor where dropout's tiles begin. What is heavy has lighter tiles anyway."""
    cut = p.heavy or p.packed or p.left is not None
    if cut or not (aligned and tma.able(t.q) and tma.able(do)):
        return None
    return configs.described(launch.architecture(p.device), p.dtype.itemsize, planner.head_dim_class(p))
