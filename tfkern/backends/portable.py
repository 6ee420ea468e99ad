"""The portable Triton kernels (kernels/flash_fwd.py, flash_bwd.py): any GPU that Triton compiles for, or the interpreter."""

import torch

from tfkern import configs, interpreter, launch, layout
from tfkern.problem import Problem


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
        if not 1 <= dim <= 256:
            reasons.append(f"{name} {dim} is outside 1..256")
    return reasons


def forward(problem: Problem, q, k, v, key_lengths):
    """out in q's memory order, lse (B, H, Nq) float32."""
    from tfkern.kernels import flash_fwd

    p = problem
    q, k, v = (x.resolve_neg() for x in (q, k, v))
    out = layout.empty_in_order_of(q, p.v_head_dim)
    lse = torch.empty(p.batch, p.heads, p.n_q, dtype=torch.float32, device=p.device)
    vec, strides = layout.kernel_strides(q, k, v, out)
    options = _options(p, "flash_fwd", vec)
    tiles = -(-p.n_q // options["BLOCK_M"])
    launch.launch(
        flash_fwd.flash_fwd, p.batch * p.heads * tiles, p.device,
        q, k, v, out, lse, key_lengths, *strides, *_numbers(p, tiles), **options,
    )  # fmt: skip
    return out, lse


def backward(problem: Problem, needed, do, dlse, q, k, v, key_lengths, out, lse):
    """dq, dk, dv, each in the memory order of what it is the gradient of; dk and dv are None if neither is needed."""
    from tfkern.kernels import flash_bwd

    p = problem
    q, k, v = (x.resolve_neg() for x in (q, k, v))
    do = layout.last_dim_dense(do.resolve_neg())
    dlse = None if dlse is None else dlse.resolve_neg().contiguous()
    dq, dk, dv = (layout.empty_in_order_of(x, x.shape[-1]) for x in (q, k, v))
    delta = torch.empty_like(lse)
    vec, strides = layout.kernel_strides(q, k, v, out, do, dq, dk, dv)
    s_q, s_k, s_v, s_out, s_do, s_dq, s_dk, s_dv = strides

    options = _options(p, "flash_bwd_dq", vec)
    tiles = -(-p.n_q // options["BLOCK_M"])
    launch.launch(
        flash_bwd.flash_bwd_dq, p.batch * p.heads * tiles, p.device,
        q, k, v, out, do, lse, dlse, delta, dq, key_lengths, s_q, s_k, s_v, s_out, s_do, s_dq, *_numbers(p, tiles), **options,
    )  # fmt: skip
    if not (needed[1] or needed[2]):  # the kernel above is needed in any case: it forms delta
        return dq, None, None
    options = _options(p, "flash_bwd_dkdv", vec)
    tiles = -(-p.n_k // options["BLOCK_N"])
    launch.launch(
        flash_bwd.flash_bwd_dkdv, p.batch * p.kv_heads * tiles, p.device,
        q, k, v, do, lse, delta, dk, dv, key_lengths, s_q, s_k, s_v, s_do, s_dk, s_dv, *_numbers(p, tiles), **options,
    )  # fmt: skip
    return dq, dk, dv


def _numbers(p: Problem, tiles: int) -> tuple:
    """The run-time numbers, in the order that all kernels share."""
    return p.heads, p.group, p.n_q, p.n_k, tiles, p.scale, int(p.lower_right), p.left, p.right


def _options(p: Problem, kernel: str, vec: int) -> dict:
    """The compile-time arguments: what a kernel is compiled anew for."""
    block_d, block_dv = configs.head_dim_class(p.head_dim), configs.head_dim_class(p.v_head_dim)
    config = configs.tile_config(launch.architecture(p.device), kernel, p.dtype.itemsize, max(block_d, block_dv))
    return dict(
        D=p.head_dim, DV=p.v_head_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, VEC=vec, PRECISION=_precision(p),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=True,  # scores are one multiply-add; Triton 3.10 turns fusion off by default
    )  # fmt: skip


def _precision(p: Problem) -> str:
    """IEEE products for float32, unless PyTorch's own switch allows TF32; 16-bit products are exact in either."""
    arch = launch.architecture(p.device)
    able = arch.startswith("sm_") or arch == "gfx942"
    allowed = able and p.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
