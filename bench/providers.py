"""Who is timed: tfkern by each backend, PyTorch's attention pinned to each of its own, FlexAttention, and the naive formula.

A provider is made for one shape and device and gives a function (q, k, v) -> out, or raises UnavailableError with the reason,
which becomes a row of the results: nobody is left out in silence.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tfkern
from tfkern import call, compat, reference
from tfkern.backends import BACKENDS, UnsupportedError
from tfkern.bench import faults
from tfkern.bench.shapes import Shape

FLASH_ATTN = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}
SDPA = {
    "sdpa default": None, "sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa math": SDPBackend.MATH,
}  # fmt: skip
NAIVE_BYTES = 8 * 2**30  # the largest N x N scores that are tried


class UnavailableError(RuntimeError):
    """This provider can't be timed here; the message says why."""


def is_ours(provider: str) -> bool:
    """Whether a provider is ours, so that its errors are our faults."""
    return provider.startswith("tfkern")


def passed_over(provider: str, error: Exception) -> str:
    """Why a provider has no figure: it can't, or there is too little memory, or a peer fails in a way of its own. Anything else
    is a fault of ours, or of a GPU that is lost to the process, and is raised again."""
    if isinstance(error, (UnavailableError, UnsupportedError)):
        return str(error).splitlines()[-1].strip()
    if faults.is_sticky(error) or (is_ours(provider) and not faults.is_out_of_memory(error)):
        raise error
    return f"failed: {faults.line(error)}"


def _tfkern(name: str, shape: Shape, dtype: torch.dtype, device: torch.device):
    example = torch.empty(1, 1, 1, shape.head_dim, dtype=dtype, device=device)
    if reasons := BACKENDS[name].unsupported(call.build(example, example, example)[0], needs_grad=True):
        raise UnavailableError("; ".join(reasons))
    return functools.partial(tfkern.attention, is_causal=shape.is_causal, backend=name)


def pinned_sdpa(kind: SDPBackend | None):
    """PyTorch's attention by one of its own backends; None leaves the choice to it."""

    def attention(q, k, v, **options):
        with sdpa_kernel(kind) if kind is not None else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, **options)

    return attention


def _sdpa(kind: SDPBackend | None, shape: Shape, dtype: torch.dtype, device: torch.device):
    run = functools.partial(pinned_sdpa(kind), is_causal=shape.is_causal)
    probe = [torch.empty(1, 1, 16, shape.head_dim, dtype=dtype, device=device) for _ in range(3)]
    try:
        run(*probe)
    except RuntimeError as error:
        raise UnavailableError(str(error).splitlines()[0]) from None
    return run


def default_choice(q, k, v, **options) -> str:
    """Which of its backends F.scaled_dot_product_attention takes for these arguments: since PyTorch 2.11 cuDNN on an H100."""
    return SDPBackend(compat.sdp_choice(q, k, v, **options)).name if compat.sdp_choice else "unknown"


def _flex(shape: Shape, dtype: torch.dtype, device: torch.device):
    """FlexAttention, compiled anew for each shape. One compiled function would reach Dynamo's limit of recompilations after
    a few shapes and then run unfused; with fullgraph it raises instead."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type != "cuda":
        raise UnavailableError("compiled FlexAttention has no backward on a CPU")
    torch.compiler.reset()
    mask = None
    if shape.is_causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.length, shape.length, device=device)
    return functools.partial(torch.compile(flex_attention, dynamic=False, fullgraph=True), block_mask=mask)


def _naive(shape: Shape, dtype: torch.dtype, device: torch.device):
    if (size := shape.batch * shape.heads * shape.length**2 * dtype.itemsize) > NAIVE_BYTES:
        raise UnavailableError(f"its scores would take {size / 2**30:.0f} GiB")
    return functools.partial(reference.attention, is_causal=shape.is_causal)


def _flash_attn(module: str, shape: Shape, dtype: torch.dtype, device: torch.device):
    """flash_attn_func of one of Dao-AILab's packages, which take (B, N, H, D)."""
    try:
        function = importlib.import_module(module).flash_attn_func
    except ImportError as error:  # not installed, or what it needs is not
        raise UnavailableError(f"the package {module} does not import: {error}") from error
    if device.type != "cuda":
        raise UnavailableError("runs on NVIDIA GPUs only")

    def run(q, k, v):
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=shape.is_causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


PROVIDERS: dict[str, Callable[[Shape, torch.dtype, torch.device], Callable]] = {
    **{f"tfkern {name}": functools.partial(_tfkern, name) for name in BACKENDS},
    **{name: functools.partial(_sdpa, kind) for name, kind in SDPA.items()},
    "flex": _flex,
    **{name: functools.partial(_flash_attn, module) for name, module in FLASH_ATTN.items()},
    "naive": _naive,
}
