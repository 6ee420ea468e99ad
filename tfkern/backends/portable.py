"""The portable Triton kernels (kernels/flash_*.py): any GPU that Triton compiles for, or the interpreter."""

import struct

import torch
from torch import Tensor

from tfkern import configs, dropout, interpreter, launch, layout
from tfkern.problem import Gradients, Problem, Tensors


def unsupported(problem: Problem) -> list[str]:
    """The reasons why these kernels can't do the problem here."""
    reasons = []
    if missing := launch.missing():
        reasons.append(missing)
    if problem.device.type == "cpu":
        if not interpreter.interpreting():
            reasons.append("CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 before the first import)")
    elif problem.device.type != "cuda":
        reasons.append(f"runs on CUDA and ROCm devices, not on {problem.device.type}")
    elif torch.version.hip is None and torch.cuda.get_device_capability(problem.device) < (8, 0):
        reasons.append("needs compute capability 8.0 or newer")
    if problem.dtype == torch.float64:
        reasons.append("float64 has no fused kernel")
    for name, dim in (("head dim", problem.head_dim), ("value head dim", problem.v_head_dim)):
        if not 0 <= dim <= 256:
            reasons.append(f"{name} {dim} is outside 0..256")
    return reasons


def forward(problem: Problem, t: Tensors) -> tuple[Tensor, Tensor]:
    """out in q's memory order, lse (B, H, Nq) float32; B is 1 for packed sequences."""
    from tfkern.kernels import flash_fwd

    p, t = problem, _plain_memory(t)
    out = layout.empty_in_order_of(t.q, p.v_head_dim)
    lse = torch.empty(t.q.shape[:3], dtype=torch.float32, device=p.device)
    vec, strides = layout.kernel_strides(t.q, t.k, t.v, out)
    options = _options(p, t, "flash_fwd", vec)
    tiles = _tiles(p, p.n_q, options["BLOCK_M"])
    launch.launch(
        flash_fwd.flash_fwd, t.q.shape[0] * p.heads * tiles, p.device,
        t.q, t.k, t.v, out, lse, _features(p, t), *strides, *_sizes(p), tiles, *_numbers(p), **options,
    )  # fmt: skip
    return out, lse


def backward(problem: Problem, t: Tensors, out, lse, do, dlse, needed, into=None) -> Gradients:
    """The needed gradients, those of q, k and v in the memory order of what they are the gradients of, or written into the
    three tensors given."""
    p, t = problem, _plain_memory(t)
    do = layout.last_dim_dense(do.resolve_neg())
    dlse = None if dlse is None else dlse.resolve_neg().contiguous()
    dq, dk, dv = into or (layout.empty_in_order_of(x, x.shape[-1]) for x in (t.q, t.k, t.v))
    need = Gradients(*needed)
    features = _features(p, t)
    delta, dslopes = _launch_dq(p, t, features, out, lse, do, dlse, dq, need.slopes)
    if need.k or need.v:
        _launch_dkdv(p, t, features, lse, delta, do, dk, dv)
    return Gradients(
        dq, *((dk, dv) if need.k or need.v else (None, None)),
        _launch_dbias(p, t, features, lse, delta, do) if need.bias else None,
        _slope_sums(p, t, dslopes) if need.slopes else None,
        _sink_sums(t.sinks, lse, delta) if need.sinks else None,
    )  # fmt: skip


def _launch_dq(p: Problem, t: Tensors, features, out, lse, do, dlse, dq, need_slopes: bool):
    """delta and, where slopes need a gradient, each query's part of it; this kernel is needed for any gradient."""
    from tfkern.kernels import flash_bwd

    delta = torch.empty_like(lse)
    dslopes = torch.empty_like(lse) if need_slopes else None
    vec, strides = layout.kernel_strides(t.q, t.k, t.v, out, do, dq)
    options = _options(p, t, "flash_bwd_dq", vec)
    tiles = _tiles(p, p.n_q, options["BLOCK_M"])
    launch.launch(
        flash_bwd.flash_bwd_dq, t.q.shape[0] * p.heads * tiles, p.device,
        t.q, t.k, t.v, out, do, lse, dlse, delta, dq, dslopes, features, *strides, *_sizes(p), tiles, *_numbers(p), **options,
    )  # fmt: skip
    return delta, dslopes


def _launch_dkdv(p: Problem, t: Tensors, features, lse, delta, do, dk, dv) -> None:
    from tfkern.kernels import flash_bwd

    vec, strides = layout.kernel_strides(t.q, t.k, t.v, do, dk, dv)
    options = _options(p, t, "flash_bwd_dkdv", vec)
    tiles = _tiles(p, p.n_k, options["BLOCK_N"])
    launch.launch(
        flash_bwd.flash_bwd_dkdv, t.q.shape[0] * p.kv_heads * tiles, p.device,
        t.q, t.k, t.v, do, lse, delta, dk, dv, features, *strides, *_sizes(p), tiles, *_numbers(p), **options,
    )  # fmt: skip


def _launch_dbias(p: Problem, t: Tensors, features, lse, delta, do) -> Tensor:
    from tfkern.kernels import flash_bwd_dbias

    dbias = torch.empty(p.bias, dtype=t.bias.dtype, device=p.device)
    vec, strides = layout.kernel_strides(t.q, t.k, t.v, do)
    options = _options(p, t, "flash_bwd_dbias", vec)
    batch, heads, rows, columns = p.bias
    sums = dict(SUM_ROWS=rows == 1, SUM_COLUMNS=columns == 1)
    grid = batch * heads * -(-rows // options["BLOCK_M"]) * -(-columns // options["BLOCK_N"])
    launch.launch(
        flash_bwd_dbias.flash_bwd_dbias, grid, p.device,
        t.q, t.k, t.v, do, lse, delta, dbias, features, *strides, *_sizes(p), *_numbers(p), *p.bias, **options, **sums,
    )  # fmt: skip
    return dbias


def _slope_sums(p: Problem, t: Tensors, parts: Tensor) -> Tensor:
    """The gradient of the slopes from each query's part (B, H, Nq); each sum has one order."""
    if p.packed and p.batch == 0:
        return torch.zeros_like(t.slopes)
    if p.packed and len(t.slopes) > 1:
        offsets = t.cu_q.long().clamp(0, p.n_q).cummax(0).values  # whatever they hold, a check of them would stop the stream
        sums = torch.segment_reduce(parts[0].T.contiguous(), "sum", offsets=offsets, unsafe=True)
    else:
        sums = parts.sum(-1)
    return sums.sum_to_size(t.slopes.shape).to(t.slopes.dtype)


def _sink_sums(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks: a sink is one more logit, whose value is 0, so its dS is P * (0 - delta)."""
    p = (sinks.float()[:, None] - lse).exp_()  # [H, 1] - [B, H, Nq]
    return -(p * delta).masked_fill_(lse == -torch.inf, 0.0).sum((0, 2)).to(sinks.dtype)


def _plain_memory(t: Tensors) -> Tensors:
    """No lazy negation, and masks as bytes."""
    t = Tensors(*(None if x is None else x.resolve_neg() for x in t))
    return t if t.mask is None else t._replace(mask=t.mask.view(torch.uint8))


def _features(p: Problem, t: Tensors):
    """The optional arguments as kernels/features.py has them."""
    from tfkern.kernels import features as device

    def mask(x: Tensor | None):
        if x is None:
            return None
        rows, columns = (layout.encode(layout.MANY if n == 1 else n) for n in x.shape[2:])
        return device.Mask(x, layout.mask_strides(x)[1], rows, columns)

    def stepped(x: Tensor) -> list[int]:
        return [layout.encode(s if n > 1 else 0) for s, n in zip(x.stride(), x.shape, strict=True)]

    return device.Features(
        key_lengths=t.key_lengths, cu_q=t.cu_q, cu_k=t.cu_k, scale=t.scale, softcap=p.softcap, mask=mask(t.mask),
        bias=mask(t.bias), slopes=None if t.slopes is None else device.Slopes(t.slopes, *stepped(t.slopes)), sinks=t.sinks,
        dropout=device.Dropout(t.seed, layout.encode(dropout.threshold(p.dropout_p)), dropout.factor(p.dropout_p))
        if p.dropout_p else None,
    )  # fmt: skip


def _tiles(p: Problem, rows: int, block: int) -> int:
    """Tiles of a head: of all its rows, or for packed sequences as many as they may need at most (kernels/sequence.py)."""
    return rows // block + p.batch + 1 if p.packed else -(-rows // block)


def _sizes(p: Problem) -> tuple:
    return p.batch, p.heads, p.group, p.n_q, p.n_k


def _numbers(p: Problem) -> tuple:
    return _float32(p.scale if p.scale is not None else 1.0), int(p.lower_right), p.left, p.right


def _float32(x: float) -> float:
    """As a launch rounds it; the interpreter would not."""
    return struct.unpack("f", struct.pack("f", x))[0]


def _options(p: Problem, t: Tensors, kernel: str, vec: int) -> dict:
    """The compile-time arguments: what a kernel is compiled anew for."""
    block_d, block_dv = configs.head_dim_class(p.head_dim), configs.head_dim_class(p.v_head_dim)
    config = configs.tile_config(launch.architecture(p.device), kernel, p.dtype.itemsize, max(block_d, block_dv), p.heavy)
    masks = [x for x in (t.mask, t.bias) if x is not None]
    value, derivative = p.score_mod or (None, None)
    options = dict(
        D=p.head_dim, DV=p.v_head_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, VEC=vec, PRECISION=_precision(p),
        MOD=value, LINEAR=p.linear, MASK_VEC=layout.mask_strides(masks[0])[0] if masks else 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=True,  # scores are one multiply-add; Triton 3.10 turns fusion off by default
    )  # fmt: skip
    if kernel in ("flash_bwd_dq", "flash_bwd_dkdv"):
        options["MOD_GRAD"] = derivative
    return options


def _precision(p: Problem) -> str:
    """IEEE products for float32, unless PyTorch's own switch allows TF32; 16-bit products are exact in either."""
    arch = launch.architecture(p.device)
    able = arch.startswith("sm_") or arch == "gfx942"
    allowed = able and p.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
