"""The Gluon kernels for Hopper (kernels/hopper)."""

import functools

import torch
from torch import Tensor

from tfkern import features, launch, layout
from tfkern.problem import Gradients, Problem, Tensors
from tfkern.tiles import (
    HOPPER,
    HOPPER_BACKWARD,
    HOPPER_FULL_CHIP,
    HOPPER_ONE_PASS,
    HOPPER_QUERIES,
    HopperConfig,
    HopperOnePass,
    HopperTiles,
)

ALIGNED = 8  # 16-bit numbers in the 16 bytes that TMA steps by


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
    if p.head_dim != p.v_head_dim or p.head_dim % ALIGNED or not 0 < p.head_dim <= max(HOPPER):
        reasons.append(f"head dims must be equal multiples of {ALIGNED} up to {max(HOPPER)}, not {p.head_dim}, {p.v_head_dim}")
    elif (p.mask or p.bias) and _tiles(p)[1].masked is None:
        reasons.append(f"a mask takes too many registers with head dim {p.head_dim}")
    if p.scale is None or not p.scale > 0:
        reasons.append("scale must be a number > 0")
    if 0 in (p.batch, p.heads, p.n_q, p.n_k):
        reasons.append("nothing to do: TMA has no empty tensors")
    return reasons


def backward_limits(p: Problem) -> list[str]:
    """The reasons why another backend must do the backward of what `limits` allows."""
    there = {
        "a mask": p.mask, "an additive mask": p.bias, "dropout": p.dropout_p, "softcap": p.softcap, "ALiBi": p.has_slopes,
        "sinks": p.has_sinks, "score_mod": p.score_mod, "packed sequences": p.packed,
        "head dims beyond 128": p.head_dim > max(HOPPER_BACKWARD["flash_bwd_dq"]),
    }  # fmt: skip
    return [f"{name}: not in the backward's kernels yet" for name, given in there.items() if given]


def forward(problem: Problem, t: Tensors) -> tuple[Tensor, Tensor]:
    """out in q's memory order, lse (B, H, Nq) float32; B is 1 for packed sequences."""
    p, t = problem, features.plain_memory(problem, t)
    q, k, v = (_for_tma(x) for x in t[:3])
    out = layout.empty_in_order_of(q, p.v_head_dim)
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=p.device)
    dim, config = _config(p)
    key = "hopper", out.stride(), features.mask_vec(t)
    if key not in p.plans:
        p.plans[key] = _plan(p, dim, config, out, features.mask_vec(t))
    rows = (HOPPER_QUERIES, config.block_n, config.block_n, HOPPER_QUERIES)
    descriptors = [_descriptor(x, n, dim) for x, n in zip((q, k, v, out), rows, strict=True)]
    p.plans[key]((*descriptors, out, lse), *features.of(p, t))
    return out, lse


def backward(problem: Problem, t: Tensors, out, lse, do, dlse, needed, into=None) -> Gradients:
    """As portable.backward, within backward_limits. In one launch where that fits; of two, that for dQ runs for any gradient,
    as delta comes of it."""
    p, t, need = problem, features.plain_memory(problem, t), Gradients(*needed)
    q, k, v, out, do = (_for_tma(x) for x in (*t[:3], out, do))
    dlse = None if dlse is None else dlse.resolve_neg().contiguous()
    wanted = into or tuple(layout.empty_in_order_of(x, x.shape[-1]) for x in t[:3])
    dq, dk, dv = (x if _ready_for_tma(x) else torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted)
    of_keys = need.k or need.v
    if of_keys and one_pass(p):
        _run_one_pass(p, t, (q, k, v, out, do, dq, dk, dv), (lse, dlse))
    else:
        delta = torch.empty_like(lse)
        _run_backward(p, "flash_bwd_dq", t, (q, k, v, out, do, dq), (lse, dlse, delta))
        if of_keys:
            _run_backward(p, "flash_bwd_dkdv", t, (q, k, v, do, dk, dv), (lse, delta))
        else:
            dk = dv = None
    made = zip((dq, dk, dv), wanted, strict=True)
    return Gradients(*(x if x is None or x is there else there.copy_(x) for x, there in made), None, None, None)


def one_pass(p: Problem) -> HopperOnePass | None:
    """The tiles of the backward in one launch, if it has memory for all queries of a key head; None too where there are fewer
    key heads than fill the chip, which two kernels divide further."""
    if p.device.type != "cpu" and p.batch * p.kv_heads < HOPPER_FULL_CHIP:
        return None
    tiles = p.group * -(-p.n_q // HOPPER_QUERIES)
    dim = min(d for d in HOPPER if p.head_dim <= d)
    return next((config for config in HOPPER_ONE_PASS.get(dim, ()) if tiles <= config.tiles), None)


def _run_one_pass(p: Problem, t: Tensors, tensors: tuple, plain: tuple) -> None:
    """The whole backward in one launch, from tensors that it takes by TMA and plain ones."""
    config = one_pass(p)
    dim = next(d for d, configs in HOPPER_ONE_PASS.items() if config in configs)
    key = "flash_bwd", plain[1] is None
    if key not in p.plans:
        from tfkern.kernels.hopper import flash_bwd

        items = p.batch * p.kv_heads
        sizes = (p.heads, p.group, p.n_q, p.n_k, -(-p.n_q // HOPPER_QUERIES), items)
        numbers = (*sizes, p.scale, int(p.lower_right), p.left, p.right)
        programs = min(items, launch.multiprocessors(p.device))
        p.plans[key] = launch.Launch(flash_bwd.flash_bwd, programs, p.device, numbers, config.constants(dim), config.options())
    descriptors = (_descriptor(x, HOPPER_QUERIES, dim) for x in tensors)
    p.plans[key]((*descriptors, *plain), *features.of(p, t))


# Which of each kernel's descriptors come past its programs, in tiles of block_n rows; of the others a consumer owns its part.
STREAMED = {"flash_bwd_dq": (1, 2), "flash_bwd_dkdv": (0, 3)}


def _run_backward(p: Problem, name: str, t: Tensors, tensors: tuple, plain: tuple) -> None:
    """One kernel of the backward, from tensors that it takes by TMA and plain ones."""
    dim = min(d for d in HOPPER_BACKWARD[name] if p.head_dim <= d)
    config = HOPPER_BACKWARD[name][dim][(p.n_k if name == "flash_bwd_dkdv" else p.n_q) <= HOPPER_QUERIES]
    key = name, *(x is None for x in plain)
    if key not in p.plans:
        p.plans[key] = _plan_backward(p, name, dim, config)
    rows = (config.block_n if i in STREAMED[name] else HOPPER_QUERIES for i in range(len(tensors)))
    descriptors = (_descriptor(x, n, dim) for x, n in zip(tensors, rows, strict=True))
    p.plans[key]((*descriptors, *plain), *features.of(p, t))


def _plan_backward(p: Problem, name: str, dim: int, config: HopperConfig) -> launch.Launch:
    """All of a backward launch but its tensors."""
    from tfkern.kernels.hopper import flash_bwd_dkdv, flash_bwd_dq

    kernel = {"flash_bwd_dq": flash_bwd_dq, "flash_bwd_dkdv": flash_bwd_dkdv}[name]
    of_keys = name == "flash_bwd_dkdv"
    heads, rows = (p.kv_heads, p.n_k) if of_keys else (p.heads, p.n_q)
    tiles = -(-rows // (HOPPER_QUERIES * config.consumers))
    numbers = (p.heads, p.group, p.n_q, p.n_k, tiles, p.scale, int(p.lower_right), p.left, p.right)
    constants = config.constants(dim, of_keys)
    constants = {key: constants[key] for key in getattr(kernel, name).arg_names if key in constants}  # in the kernel's order
    return launch.Launch(getattr(kernel, name), p.batch * heads * tiles, p.device, numbers, constants, config.options())


def _plan(p: Problem, dim: int, config: HopperConfig, out: Tensor, mask_vec: int) -> launch.Launch:
    """All of the launch but its tensors."""
    from tfkern.kernels.hopper import flash_fwd

    rows = HOPPER_QUERIES * config.consumers
    # of all queries of a head, or for packed sequences as many as they may need at most (kernels/sequence.py)
    tiles = p.n_q // rows + p.batch + 1 if p.packed else -(-p.n_q // rows)
    items = (1 if p.packed else p.batch) * p.heads * tiles
    stride_o = tuple(layout.encode(s // ALIGNED if n > 1 else 0) for s, n in zip(out.stride()[:3], out.shape[:3], strict=True))
    sizes = (p.batch, p.heads, p.group, p.n_q, p.n_k, tiles, items)
    numbers = (stride_o, *sizes, p.scale, int(p.lower_right), p.left, p.right)
    mod = p.score_mod[0] if p.score_mod else None
    constants = dict(MOD=mod, LINEAR=p.linear, MASK_VEC=mask_vec, DIM=p.head_dim, **config.constants(dim))
    programs = min(items, launch.multiprocessors(p.device) * config.programs)
    return launch.Launch(flash_fwd.flash_fwd, programs, p.device, numbers, constants, config.options())


def _tiles(p: Problem) -> tuple[int, HopperTiles]:
    """(head-dim class, its tiles)."""
    dim = min(d for d in HOPPER if p.head_dim <= d)
    return dim, HOPPER[dim]


def _config(p: Problem) -> tuple[int, HopperConfig]:
    """(head-dim class, those of its tiles that fit the problem)."""
    dim, tiles = _tiles(p)
    if p.mask or p.bias:
        return dim, tiles.masked
    if p.n_q <= HOPPER_QUERIES:
        return dim, tiles.single
    return dim, tiles.heavy if p.heavy else tiles.usual(p.n_q)


def _for_tma(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where TMA can't read it in place."""
    return x if _ready_for_tma(x) else x.resolve_neg().clone(memory_format=torch.contiguous_format)


def _ready_for_tma(x: Tensor) -> bool:
    """Whether rows are dense, and all else multiples of 16 bytes."""
    steps = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    dense = x.stride(3) == 1 or x.shape[3] == 1
    return dense and all(s > 0 and s % ALIGNED == 0 for s in steps) and x.data_ptr() % 16 == 0 and not x.is_neg()


def _descriptor(x: Tensor, rows: int, dim: int):
    """Of (B, H, N, D) in blocks of (1, 1, rows, dim)."""
    block, swizzled, make = _swizzled(rows, dim)
    # A dim of size 1 is never stepped along: its stride is noise that TMA might refuse.
    strides = [s if n > 1 else ALIGNED for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return make(x, list(x.shape), [*strides, 1], block, swizzled)


@functools.cache
def _swizzled(rows: int, dim: int):
    """(block, its layout in shared memory, the class of descriptors): Triton takes longer to find a layout than all else."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, dim]
    return block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16), TensorDescriptor  # float16's layout is the same
