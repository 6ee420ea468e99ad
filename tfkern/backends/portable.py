"""The portable Triton kernels (kernels/flash_*.py): any GPU that Triton compiles for, or the interpreter."""

from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import configs, features, launch, layout, tma
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
    launch_fwd, result = _plan(p, _plan_forward, t)
    out = result.empty()
    stats = features.empty_stats(p)
    launch_fwd((t.q, t.k, t.v, out, stats), *features.of(p, t))
    return out, stats


def backward(problem: Problem, t: Tensors, out, stats, do, dlse, needed, into=None) -> Gradients:
    """The needed gradients, those of q, k and v in the memory order of what they are the gradients of, or written into the
    three tensors given."""
    p, t = problem, features.plain_memory(problem, t)
    do = layout.last_dim_dense(do.resolve_neg())
    dlse = None if dlse is None else dlse.resolve_neg().contiguous()
    need = Gradients(*needed)
    aligned = (t.q.data_ptr() | do.data_ptr()) % launch.ALIGNMENT == 0
    plan = _plan(p, _plan_backward, t, out, do, need, into, dlse is None, aligned)
    dq, dk, dv = into or (result.empty() for result in plan.results)
    delta = features.empty_rows(p)
    dslopes = features.empty_rows(p) if need.slopes else None
    optional = features.of(p, t)
    if plan.dq is None:
        plan.dkdv((t.q, do, t.k, t.v, stats, dlse, delta, dq, dk, dv, dslopes), *optional)
    else:
        # delta and, where slopes need a gradient, each query's part of it, come of this one: any gradient needs it
        plan.dq((t.q, t.k, t.v, out, do, stats, dlse, delta, dq, dslopes), *optional)
        if need.k or need.v:
            plan.dkdv((t.q, do, t.k, t.v, stats, None, delta, None, dk, dv, None), *optional)
    dbias = None
    if need.bias:
        dbias = torch.empty(p.bias, dtype=t.bias.dtype, device=p.device)
        plan.dbias((t.q, t.k, t.v, do, stats, delta, dbias), *optional)
    return Gradients(
        dq, *((dk, dv) if need.k or need.v else (None, None)), dbias,
        features.slope_sums(p, t, dslopes) if need.slopes else None,
        features.sink_sums(t.sinks, stats, delta) if need.sinks else None,
    )  # fmt: skip


def _plan(p: Problem, make, t: Tensors, *more):
    """What `make` plans, once for all calls whose tensors lie in memory as these do. The problem keeps it."""
    key = (make, configs.overrides(), _precision(p), *map(_memory, t[:3] if p.plain else t), *map(_memory, more))
    plan = p.plans.get(key)
    if plan is None:
        plan = p.plans[key] = make(p, t, *more)
    return plan


def _memory(x):
    """How a tensor lies in memory; anything else stands for itself."""
    if isinstance(x, Tensor):
        return x.stride(), x.dtype
    return tuple(map(_memory, x)) if isinstance(x, tuple) else x


def _plan_forward(p: Problem, t: Tensors) -> tuple[launch.Launch, layout.Blank]:
    from tfkern.kernels import flash_fwd

    result = layout.Blank(t.q, p.v_head_dim)
    vec, strides = layout.kernel_strides(t.q, t.k, t.v, result)
    return _launch(p, t, flash_fwd.flash_fwd, vec, strides, p.heads), result


class BackwardPlan(NamedTuple):
    """The launches of a backward, and what dq, dk and dv are to be. Without dq, dkdv makes all three in one pass."""

    dq: launch.Launch | None
    dkdv: launch.Launch
    dbias: launch.Launch | None
    results: tuple[layout.Blank, layout.Blank, layout.Blank]


def _plan_backward(p: Problem, t: Tensors, out, do, need: Gradients, into, without_dlse: bool, aligned: bool) -> BackwardPlan:
    from tfkern.kernels import flash_bwd_dbias, flash_bwd_dkdv, flash_bwd_dq

    results = tuple(layout.Blank(x, x.shape[-1]) for x in t[:3])
    dq, dk, dv = into or results
    launch_dq, one_pass = None, None
    vec, strides = layout.kernel_strides(t.q, t.k, t.v, do, dq, dk, dv)
    if vec and not p.packed:  # whose longest sequence nobody knows; free strides take too many registers
        one_pass = configs.one_pass(_architecture(p), p.dtype.itemsize, _block(p), p.n_k, p.batch * p.kv_heads, p.heavy)
    if one_pass is not None:
        launch_dkdv = _launch(p, t, flash_bwd_dkdv.flash_bwd_dkdv, vec, strides, p.kv_heads, one_pass)
    else:
        vec, strides = layout.kernel_strides(t.q, t.k, t.v, out, do, dq)
        launch_dq = _launch(p, t, flash_bwd_dq.flash_bwd_dq, vec, strides, p.heads)
        launch_dkdv = _plan_dkdv(p, t, do, dk, dv, aligned)
    launch_dbias = None
    if need.bias:
        vec, strides = layout.kernel_strides(t.q, t.k, t.v, do)
        launch_dbias = _launch(p, t, flash_bwd_dbias.flash_bwd_dbias, vec, strides, p.heads)
    return BackwardPlan(launch_dq, launch_dkdv, launch_dbias, results)


def _plan_dkdv(p: Problem, t: Tensors, do, dk, dv, aligned: bool) -> launch.Launch:
    """dK and dV by themselves, queries and their gradients by TMA if it can bring them: it cuts tiles where a tensor ends, not
    where a window or a packed sequence does, or where dropout's tiles begin. What is heavy has lighter tiles anyway."""
    from tfkern.kernels.flash_bwd_dkdv import flash_bwd_dkdv

    cut = p.heavy or p.packed or p.left is not None
    if aligned and not cut and tma.able(t.q) and tma.able(do):
        config = configs.described(_architecture(p), p.dtype.itemsize, _block(p))
        if config is not None:
            vec, (k, v, *results) = layout.kernel_strides(t.k, t.v, dk, dv)
            strides = [None, k, v, None, None, *results]
            blocks = [(config.block_m, configs.head_dim_class(d), False) for d in (p.head_dim, p.v_head_dim)]
            return _launch(p, t, flash_bwd_dkdv, vec, strides, p.kv_heads, config, tuple(blocks))
    vec, (*qkv, do_stride, dk_stride, dv_stride) = layout.kernel_strides(t.q, t.k, t.v, do, dk, dv)
    return _launch(p, t, flash_bwd_dkdv, vec, [*qkv, do_stride, None, dk_stride, dv_stride], p.kv_heads)


def _architecture(p: Problem) -> str:
    return launch.architecture(p.device)


def _block(p: Problem) -> int:
    """The head-dim class whose tiles serve both head dims."""
    return configs.head_dim_class(max(p.head_dim, p.v_head_dim))


def _launch(p: Problem, t: Tensors, kernel, vec: int, strides: list, heads: int, config=None, blocks=()) -> launch.Launch:
    """A kernel with its grid, its numbers and what it is compiled for; `heads` are those that its programs share out. Without
    config, the table's tiles. blocks: of tensors that it gets as descriptors."""
    name = kernel.__name__
    heavy = p.heavy or vec == 0  # an address each takes as many registers as scores do
    config = config or configs.tile_config(_architecture(p), name, p.dtype.itemsize, _block(p), heavy)
    sizes = (p.batch, p.heads, p.group, p.n_q, p.n_k)
    numbers = (p.scale if p.scale is not None else 1.0, int(p.lower_right), p.left, p.right)
    value, derivative = p.score_mod or (None, None)
    constants = dict(
        HEAD_DIM=p.head_dim, HEAD_DIM_V=p.v_head_dim, BLOCK_D=configs.head_dim_class(p.head_dim),
        BLOCK_DV=configs.head_dim_class(p.v_head_dim), VEC=vec, PRECISION=_precision(p), MOD=value, MOD_GRAD=derivative,
        LINEAR=p.linear, MASK_VEC=features.mask_vec(t), STATS_ROWS=p.stats_rows, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )  # fmt: skip
    if name == "flash_bwd_dbias":
        batch, bias_heads, rows, columns = p.bias
        constants |= dict(SUM_ROWS=rows == 1, SUM_COLUMNS=columns == 1)
        grid = batch * bias_heads * -(-rows // config.block_m) * -(-columns // config.block_n)
        arguments = (*strides, *sizes, *numbers, *p.bias)
    else:
        rows, block = (p.n_k, config.block_n) if name == "flash_bwd_dkdv" else (p.n_q, config.block_m)
        # of all rows of a head, or for packed sequences as many as they may need at most (kernels/sequence.py)
        tiles = rows // block + p.batch + 1 if p.packed else -(-rows // block)
        grid = (1 if p.packed else p.batch) * heads * tiles
        arguments = (*strides, *sizes, tiles, *numbers)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    return launch.Launch(kernel, grid, p.device, arguments, constants, config.options(), blocks)


def _precision(p: Problem) -> str:
    """IEEE products for float32, unless PyTorch's own switch allows TF32; 16-bit products are exact in either."""
    if p.dtype != torch.float32:
        return "ieee"
    arch = launch.architecture(p.device)
    able = arch.startswith("sm_") or arch == "gfx942"
    return "tf32" if able and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
