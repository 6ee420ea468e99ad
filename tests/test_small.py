"""Small problems at the smallest tiles, tenths of a second each in the interpreter. `make mutants` holds broken kernels against
these; each feature meets every kind of tile (cut by the left edge, whole, cut by the right edge, ragged) somewhere here."""

import pytest
import torch
import triton
import triton.language as tl

import tfkern
from tfkern import checks, configs, launch, reference, score_mods, testing, tma
from tfkern.kernels import score_mods as kernel_mods
from tfkern.testing import Case

# Not square, and other ways round in each kernel: a mix-up of the two sizes must show.
TILES = dict(
    flash_fwd=configs.TileConfig(32, 16), flash_bwd_dq=configs.TileConfig(16, 32), flash_bwd_dkdv=configs.TileConfig(16, 32),
    flash_bwd_dbias=configs.TileConfig(16, 32),
)  # fmt: skip
RIGHT = dict(is_causal=True, causal_alignment="lower_right")
PACKED = ((21, 0, 1, 34), (37, 20, 5, 18))

CASES = [
    Case("full", 1, 37, 9),
    Case("groups", 4, 20, 8, n_k=33, batch=2, kv_heads=2, v_head_dim=3, layout="bnhd"),
    Case("causal", 1, 70, 16, options=dict(is_causal=True)),
    Case("lower-right", 1, 37, 8, n_k=70, options=RIGHT),
    Case("window", 1, 100, 8, options=dict(window=(37, 39))),
    Case("window-narrow", 1, 70, 8, n_k=90, options=dict(window=(3, 4), causal_alignment="lower_right")),
    Case("padded", 1, 37, 8, n_k=70, batch=3, options=dict(key_lengths=(70, 0, 33), **RIGHT)),
    Case("padded-any", 1, 37, 8, n_k=70, batch=2, options=dict(key_lengths=(33, 69))),
    Case("strided", 2, 20, 8, batch=2, layout="strided", options=dict(scale=-0.4)),
    Case("bnhd", 2, 20, 24, batch=2, layout="bnhd", options=dict(scale=0.0)),
    Case("mask", 2, 20, 8, n_k=50, batch=2, mask="bool bhqk"),
    Case("mask-causal", 1, 50, 8, n_k=70, mask="bool 11qk", options=RIGHT),
    Case("mask-of-queries", 1, 37, 8, mask="bool 11q1"),
    Case("bias", 2, 20, 8, n_k=70, batch=2, mask="float bhqk"),
    Case("bias-groups", 4, 20, 8, n_k=33, batch=2, kv_heads=2, mask="float bhqk"),
    Case("bias-aligned", 2, 40, 8, n_k=48, batch=1, mask="float 1hqk", options=dict(window=(20, 20))),
    Case("bias-of-keys", 2, 20, 8, n_k=50, batch=2, mask="float b11k"),
    Case("bias-of-queries", 2, 37, 8, n_k=50, batch=1, mask="float 1hq1", options=dict(window=(20, 30))),
    Case("bias-of-nothing", 2, 20, 8, n_k=40, mask="float 1111", options=RIGHT),
    Case("bias-window", 1, 90, 8, mask="float 11qk", options=dict(window=(20, 9))),
    Case("dropout", 2, 20, 8, n_k=50, batch=2, options=dict(dropout_p=0.4)),
    Case("dropout-window", 2, 90, 8, mask="float 11qk", options=dict(window=(21, 10), dropout_p=0.4)),
    Case("packed", 2, 0, 8, lengths=PACKED, options=dict(causal_alignment="lower_right", window=(20, 2))),
    Case("packed-groups", 4, 0, 8, kv_heads=2, lengths=PACKED),
    Case("packed-bias", 2, 0, 8, lengths=PACKED, mask="float bhqk", sinks=True),
    Case("packed-bias-of-keys", 2, 0, 8, lengths=PACKED, mask="float 1h1k", options=dict(dropout_p=0.4)),
    Case("packed-many", 1, 0, 8, lengths=((0, 1, 0, 16, 15, 33, 0, 2, 40), (2, 3, 16, 0, 32, 31, 1, 2, 17)), slopes="bh"),
    Case("slopes", 2, 20, 8, n_k=50, batch=2, slopes="bh", options=RIGHT),
    Case("slopes-mask", 2, 20, 8, n_k=50, mask="bool bhqk", slopes="h"),
    Case("slopes-window", 1, 70, 8, slopes="h", options=dict(window=(30, 30))),
    Case("sinks", 2, 37, 8, n_k=20, sinks=True, options=dict(window=(5, 5))),
    Case("softcap", 1, 37, 8, magnitude=3.0, options=dict(softcap=0.5)),
    Case("score-mod", 2, 20, 8, batch=2, score_mod="cooling", mask="bool bhqk", options=dict(softcap=3.0)),
    Case("score-mod-log", 1, 37, 8, score_mod="signed_log", options=dict(scale=(-0.5,), window=(20, 10))),
    Case("large", 1, 37, 8, magnitude=5.0),
]  # fmt: skip


ONE_PASS = configs.TileConfig(16, 128)


# Packed sequences and strided inputs always take two passes.
@pytest.mark.parametrize(
    ("case", "passes"),
    [pytest.param(c, n, id=f"{c}-{n}") for c in CASES for n in (1, 2) if n == 2 or not (c.lengths or c.layout == "strided")],
)
def test_small(case, passes, device):
    with configs.override(**TILES, flash_bwd_one_pass=ONE_PASS if passes == 1 else None):
        errors = testing.check(case, torch.float32, "portable", device)
    assert all(e.ok for e in errors), "\n" + "\n".join(map(str, errors))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("full", "bias", "dropout", "packed")], ids=str)
def test_small_bf16(case, device):
    with configs.override(**TILES):
        errors = testing.check(case, torch.bfloat16, "portable", device)
    assert all(e.ok for e in errors), "\n" + "\n".join(map(str, errors))


# dK and dV with queries from descriptors, and what descriptors can't bring, which pointers do.
DESCRIBED = [
    *(c for c in CASES if c.name in ("causal", "lower-right", "padded", "padded-any", "bnhd", "large")),
    Case("groups", 4, 20, 16, n_k=33, batch=2, kv_heads=2, v_head_dim=8, layout="bnhd"),
    Case("more-queries", 2, 70, 8, n_k=37, options=RIGHT),
    Case("window-right", 1, 70, 24, options=dict(window=(None, 5))),
    Case("sinks", 2, 37, 8, n_k=20, sinks=True),
]
POINTERS = [
    *(c for c in CASES if c.name in ("window", "strided", "mask", "bias", "dropout", "packed", "slopes", "softcap")),
    Case("odd-dim", 2, 37, 20),
    Case("odd-value-dim", 2, 37, 8, v_head_dim=4),
]


@pytest.mark.parametrize(
    ("case", "descriptors"),
    [pytest.param(c, n, id=f"{c}-{n}") for n, cases in ((2, DESCRIBED), (0, POINTERS)) for c in cases],
)
def test_small_described(case, descriptors, device, monkeypatch):
    if launch.architecture(torch.device(device)) in ("sm_80", "sm_86", "sm_89"):
        pytest.skip("no TMA")
    made, make = [], tma.descriptor
    monkeypatch.setattr(tma, "descriptor", lambda *args: made.append(args) or make(*args))
    with configs.override(**TILES, flash_bwd_one_pass=None, flash_bwd_dkdv_described=configs.TileConfig(16, 32)):
        errors = testing.check(case, torch.bfloat16, "portable", device)
    assert all(e.ok for e in errors), "\n" + "\n".join(map(str, errors))
    assert len(made) == descriptors


def test_an_address_that_tma_cannot_take(device):
    """Of a call like one before in all but where its tensors begin."""
    memory = [torch.randn(37 * 8 + 8, device=device).bfloat16() for _ in range(4)]
    with configs.override(**TILES, flash_bwd_one_pass=None, flash_bwd_dkdv_described=configs.TileConfig(16, 32)):
        for first in (0, 1, 8):
            *leaves, do = (x[first : first + 37 * 8].view(1, 1, 37, 8).requires_grad_() for x in memory)
            found = torch.autograd.grad(tfkern.attention(*leaves, backend="portable"), leaves, do.detach())
            truth = torch.autograd.grad(reference.attention(*(x.double() for x in leaves)), leaves, do.detach().double())
            for f, t in zip(found, truth, strict=True):
                torch.testing.assert_close(f, t, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter's maximum of a row
@pytest.mark.parametrize(
    ("options", "query", "keys"),
    [
        (dict(window=(4, 0)), 40, slice(0, 32)),
        (dict(window=(None, 3), dropout_p=0.4), 20, slice(32, 64)),
    ],
    ids=["window", "dropout"],
)
def test_a_query_is_not_read_by_a_tile_of_keys_that_it_does_not_see(options, query, keys, device):
    """It may hold NaN, and stand in a tile with queries that do see them: TMA would bring it too."""
    q, k, v, do = (torch.randn(1, 1, 70, 8, device=device).bfloat16() for _ in range(4))
    q[:, :, query] = do[:, :, query] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with configs.override(**TILES, flash_bwd_one_pass=None, flash_bwd_dkdv_described=configs.TileConfig(16, 32)):
        _, dk, dv = torch.autograd.grad(tfkern.attention(*leaves, backend="portable", **options), leaves, do)
    assert dk[:, :, keys].isfinite().all()
    assert dv[:, :, keys].isfinite().all()


@triton.jit
def _hide_row_3(score, b, h, i, j):
    return tl.where(i == 3, float("-inf"), score)


@triton.jit
def _hide_row_3_derivative(score, b, h, i, j):
    return tl.where(i == 3, 0.0, score * 0.0 + 1.0)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_score_mod_may_hide_all_keys_of_a_query(passes, device):
    """Its logits are -inf, though it sees keys: 0, and no gradients, as of a query that sees none."""
    leaves = [torch.randn(1, 1, 37, 8, device=device, requires_grad=True) for _ in range(3)]
    mod = (_hide_row_3, _hide_row_3_derivative)
    with configs.override(**TILES, flash_bwd_one_pass=ONE_PASS if passes == 1 else None):
        out = tfkern.attention(*leaves, score_mod=mod, backend="portable")
        found = torch.autograd.grad(out.square().sum(), leaves)
    seen = (torch.arange(37) != 3)[:, None].to(device)
    wanted = reference.attention(*(x.double() for x in leaves), attn_mask=seen)
    torch.testing.assert_close(out, wanted.float())
    truth = torch.autograd.grad(wanted.square().sum(), leaves)
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t)


@pytest.mark.parametrize("passes", [1, 2])
def test_scores_far_below_zero(passes, device):
    """exp(-lse) overflows there: what keys that do not exist weigh must not reach dQ."""
    q = torch.full((1, 1, 37, 8), 10.0, device=device) + torch.randn(1, 1, 37, 8, device=device)
    leaves = [x.detach().requires_grad_() for x in (q, -q, torch.randn_like(q))]
    with configs.override(**TILES, flash_bwd_one_pass=ONE_PASS if passes == 1 else None):
        found = torch.autograd.grad(tfkern.attention(*leaves, backend="portable").square().sum(), leaves)
    truth = torch.autograd.grad(reference.attention(*(x.double() for x in leaves)).square().sum(), leaves)
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", [torch.float32, torch.bool], ids=str)
@pytest.mark.cpu  # only the interpreter sees an address beside a tensor
def test_a_mask_smaller_than_its_sequences_is_not_left(mask, monkeypatch):
    """On a GPU nobody checks that packed sequences fit their mask; nothing beside it may be read or written even so."""
    monkeypatch.setattr(checks, "mask", lambda *args: None)
    q = torch.randn(40, 1, 8, requires_grad=True)
    bias = torch.zeros(1, 1, 20, 18).to(mask)
    if mask == torch.float32:
        bias.requires_grad_()
    ends = torch.tensor([0, 33, 40])
    with configs.override(**TILES):
        out = tfkern.attention_varlen(q, q, q, ends, ends, bias, backend="portable")
        out.nansum().backward()


def test_boundaries_that_nobody_checked(monkeypatch, device):
    """The first sequence begins at 0 whatever stands there, and rows behind the last get 0."""
    monkeypatch.setattr(checks, "cu_seqlens", lambda *args: None)
    q = torch.randn(40, 1, 8, device=device, requires_grad=True)
    good, odd = (torch.tensor([first, 20, 33], device=device) for first in (0, 3))
    options = dict(sinks=torch.ones(1, device=device), return_lse=True, backend="portable")
    with configs.override(**TILES):
        (found, lse), (wanted, _) = (tfkern.attention_varlen(q, q, q, cu, cu, **options) for cu in (odd, good))
        gradients = [torch.autograd.grad(out.square().sum(), q)[0] for out in (found, wanted)]
    assert torch.equal(found, wanted)
    assert torch.equal(*gradients)
    assert not found[33:].any()
    assert (lse[:, 33:] == -torch.inf).all()
    assert not gradients[0][33:].any()


def test_the_examples_of_score_mod_are_what_they_say():
    """The kernels and the oracle share them, so nothing else would notice if both were wrong."""
    s = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    i, j = torch.arange(5)[:, None], torch.arange(7)[None, :]
    b, h = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None]
    temperature = 1.0 + 0.125 * (h + b + 1) * torch.log2(1.0 + (i - j).abs())
    wanted = {
        kernel_mods.signed_log: s.sign() * (1 + s.abs()).log(),
        kernel_mods.signed_log_derivative: 1 / (1 + s.abs()),
        kernel_mods.cooling: s / temperature,
        kernel_mods.cooling_derivative: (1 / temperature).expand_as(s),
    }
    for function, value in wanted.items():
        found = score_mods.each_head(function, s, range(2), 0, i, j)
        torch.testing.assert_close(found.expand_as(s), value.to(found.dtype))
