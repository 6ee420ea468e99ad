"""Tensors beyond 2**31 elements, without their memory: the addresses that the kernels form, for strides that would be theirs."""

import pytest
import torch
import triton
import triton.language as tl

from tfkern import interpreter
from tfkern.kernels import score, sequence, tile
from tfkern.kernels.features import Features, Mask
from tfkern.layout import encode, kernel_strides, mask_strides

BASE = 1 << 40  # addresses are looked at, never followed


@triton.jit
def _tile_addresses(PTR, stride, OUT, b, h, row, start, VEC: tl.constexpr):
    at = tile.pointers(tile.head(PTR, stride, b, h, row, VEC), stride, start, 16, 16, VEC).to(tl.int64)
    tl.store(OUT + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], at)


def run(kernel, *args):
    device = "cpu" if interpreter.interpreting() else "cuda"
    out = torch.zeros(16, 16, dtype=torch.int64, device=device)
    base = torch.zeros(64, dtype=torch.float16, device=device)
    args = [out if a == "out" else base if a == "base" else a for a in args]
    if device == "cpu":
        interpreter.run(kernel, 1, args, {})
    else:
        kernel[(1,)](*args)
    return (out.cpu() - base.data_ptr()) // 2


# (B, H, N, D) strides of tensors that do not fit into 2**31 elements, and a place far in them.
FAR = {
    "many batches": ((2**26, 64 * 64, 64, 1), (40, 3, 0, 128)),
    "many heads": ((2**36, 2**27, 64, 1), (1, 31, 0, 128)),
    "long": ((2**40, 64, 2**22, 1), (0, 1, 0, 2**20)),
    "packed, far row": ((0, 64, 4096, 1), (0, 3, 2**25, 64)),
    "strided columns": ((2**26, 64, 4096, 2**29), (3, 1, 0, 512)),
}


@pytest.mark.parametrize("name", FAR)
def test_tiles(name):
    strides, (b, h, row, start) = FAR[name]
    big = torch.empty_strided((2**7, 2**7, 2**30, 16), strides, dtype=torch.float16, device="meta")
    vec, (encoded,) = kernel_strides(big)
    assert vec == (0 if strides[3] != 1 or strides[2] >= 2**23 else 16)
    found = run(_tile_addresses, "base", encoded, "out", b, h, row, start, vec)
    i, d = torch.arange(16)[:, None], torch.arange(16)[None, :]
    want = b * strides[0] + h * strides[1] + (row + start + i) * strides[2] + d * strides[3]
    assert want.max() > 2**31
    assert torch.equal(found, want)


@triton.jit
def _mask_addresses(F, OUT, b, h, start_m, start_n, MASK_VEC: tl.constexpr):
    seq = sequence.Sequence(b, b, 0, 2**30, 0, 2**30, True)
    M = score.head_mask(F.bias, seq, h, MASK_VEC)
    offs_m = start_m + tl.arange(0, 16)
    offs_n = start_n + tl.arange(0, 16)
    at = score.mask_pointers(M, offs_m[:, None], offs_n[None, :], start_m, start_n, MASK_VEC).to(tl.int64)
    tl.store(OUT + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], at)


@pytest.mark.parametrize(
    "strides", [(2**35, 2**32, 2**17, 1), (2**35, 2**32, 3, 2**17), (0, 0, 2**22, 1), (2**35, 0, 2**30, 1)], ids=str
)
def test_masks(strides):
    b, h, start_m, start_n = 3, 5, 2**16, 2**15
    big = torch.empty_strided((8, 8, 2**20, 2**20), strides, dtype=torch.float16, device="meta")
    vec, encoded = mask_strides(big)
    device = "cpu" if interpreter.interpreting() else "cuda"
    base = torch.zeros(64, dtype=torch.float16, device=device)
    mask = Mask(base, encoded, encode(2**20), encode(2**20))
    out = torch.zeros(16, 16, dtype=torch.int64, device=device)
    args = (Features(bias=mask), out, b, h, start_m, start_n, vec)
    if device == "cpu":
        interpreter.run(_mask_addresses, 1, args, {})
    else:
        _mask_addresses[(1,)](*args)
    i, j = torch.arange(16)[:, None], torch.arange(16)[None, :]
    want = b * strides[0] + h * strides[1] + (start_m + i) * strides[2] + (start_n + j) * strides[3]
    assert torch.equal((out.cpu() - base.data_ptr()) // 2, want)
