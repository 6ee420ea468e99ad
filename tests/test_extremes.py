"""Very large biases, scores and sinks, and other values at the ends of their range."""

import pytest
import torch
import triton
import triton.language as tl

import tfkern
from tfkern import reference

BACKENDS = pytest.mark.parametrize("backend", ["portable", "eager"])
LARGE = [-1e4, -1e9, 1e9, 1e30, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min]


@pytest.fixture
def qkv(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, 8, generator=generator).to(device).requires_grad_() for n in (20, 40, 40)]


def close(found, truth, **more):
    torch.testing.assert_close(found, truth, rtol=2e-5, atol=2e-5, **more)


@BACKENDS
@pytest.mark.parametrize("size", LARGE)
def test_rows_of_one_large_bias_are_averages(size, backend, device):
    """The log of a sum is nothing beside 1e9: a maximum must be subtracted before, not the log-sum-exp after."""
    q, v = torch.zeros(1, 1, 4, 8, device=device), torch.rand(1, 1, 50, 8, device=device)
    bias = torch.full((4, 50), size, device=device)
    out = tfkern.attention(q, v * 0, v, bias, backend=backend)
    close(out, v.mean(2, keepdim=True).expand_as(out))
    out = tfkern.attention(q, v * 0, v, bias, sinks=torch.tensor([size], device=device), backend=backend)
    close(out, (v.sum(2, keepdim=True) / 51).expand_as(out))
    half = tfkern.attention(q.half(), v.half() * 0, v.half(), bias, backend=backend)
    assert half.isfinite().all()


@BACKENDS
def test_masks_as_transformers_makes_them(qkv, backend, device):
    """finfo.min instead of -inf, causal, padded on the left: the first rows have nothing but hidden keys."""
    mask = torch.zeros(2, 1, 20, 40, device=device)
    mask[1, :, :, :9] = torch.finfo(torch.float32).min
    close(tfkern.attention(*qkv, mask, is_causal=True, backend=backend), reference.attention(*qkv, mask, is_causal=True))


@BACKENDS
def test_large_scores(backend, device):
    a, v = torch.full((1, 1, 4, 8), 3e4, device=device), torch.rand(1, 1, 4, 8, device=device)
    close(tfkern.attention(a, a, v, window=(9, 9), backend=backend), v.mean(2, keepdim=True).expand_as(v))


@BACKENDS
@pytest.mark.parametrize("scale", [1e-50, 1.4e-45, -1e-30, 1e30])
def test_scales_at_the_ends_of_float32(qkv, scale, backend):
    found = tfkern.attention(*qkv, scale=scale, is_causal=True, backend=backend)
    close(found, reference.attention(*qkv, scale=scale, is_causal=True))


@BACKENDS
def test_an_infinite_sink_is_nan_as_in_the_oracle(qkv, backend, device):
    sinks = torch.tensor([torch.inf, 0.0], device=device)
    found, want = tfkern.attention(*qkv, sinks=sinks, backend=backend), reference.attention(*qkv, sinks=sinks)
    assert torch.equal(found.isnan(), want.isnan())


@BACKENDS
def test_nan_in_do_reaches_only_the_keys_of_its_query(qkv, backend):
    do = torch.ones(2, 2, 20, 8, device=qkv[0].device)
    do[0, 0, 3] = torch.nan
    found, want = (
        torch.autograd.grad(f(*qkv, is_causal=True, window=(100, None), **o), qkv[1], do)[0]
        for f, o in ((tfkern.attention, dict(backend=backend)), (reference.attention, {}))
    )
    assert torch.equal(found.isnan(), want.isnan())


@BACKENDS
def test_sinks_of_rows_without_keys(backend, device):
    """What comes back to a row that saw no key does not reach the sinks, but through lse."""
    q = torch.randn(9, 2, 8, device=device)
    k = torch.randn(5, 2, 8, device=device)
    sinks = torch.randn(2, device=device, requires_grad=True)
    ends = [torch.tensor(x, device=device) for x in ([0, 5, 9], [0, 5, 5])]
    out = tfkern.attention_varlen(q, k, k, *ends, sinks=sinks, backend=backend)
    do = torch.ones_like(out)
    do[5:] = torch.nan
    (gradient,) = torch.autograd.grad(out, sinks, do)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("garbage", [[0, 5, 10**9], [0, -3, 7], [9, 2, 12]], ids=str)
def test_garbage_lengths_and_slopes_of_each_sequence(garbage, device, monkeypatch):
    from tfkern import checks

    monkeypatch.setattr(checks, "cu_seqlens", lambda *args: None)
    q = torch.randn(12, 2, 8, device=device, requires_grad=True)
    slopes = torch.zeros(2, 2, device=device, requires_grad=True)
    ends = torch.tensor(garbage, device=device)
    tfkern.attention_varlen(q, q, q, ends, ends, alibi_slopes=slopes, backend="portable").sum().backward()
    assert slopes.grad.isfinite().all()


@BACKENDS
def test_no_sequence_at_all(backend, device):
    q = torch.randn(5, 2, 8, device=device)
    ends = torch.zeros(1, dtype=torch.int32, device=device)
    out = tfkern.attention_varlen(q, q, q, ends, ends, alibi_slopes=torch.zeros(0, 2, device=device), backend=backend)
    assert torch.equal(out, torch.zeros_like(out))


@BACKENDS
@pytest.mark.parametrize("which", ["alibi_slopes", "sinks", "scale", "attn_mask"])
def test_lazily_negated_arguments(qkv, which, backend, device):
    x = {"alibi_slopes": torch.rand(2), "sinks": torch.rand(2), "scale": torch.tensor(0.3), "attn_mask": torch.randn(20, 40)}[
        which
    ]
    x = x.to(device)
    negated = torch._neg_view(x)
    assert negated.is_neg()
    close(tfkern.attention(*qkv, **{which: negated}, backend=backend), tfkern.attention(*qkv, **{which: -x}, backend=backend))


def test_a_call_that_fails_leaves_the_generator_alone(qkv):
    state = torch.get_rng_state()
    with pytest.raises(tfkern.UnsupportedError):
        tfkern.attention(*(x.double() for x in qkv), dropout_p=0.5, backend="portable")
    with pytest.raises(ValueError, match="backend must be"):
        tfkern.attention(*qkv, dropout_p=0.5, backend="nope")
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_leaves_masks_of_float64_calls_alone(device):
    q = torch.randn(1, 2, 8, 8, dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert tfkern.attention(q, q, q, torch.randn(8, 8, device=device)).dtype == torch.float64
        half = q.half()
        assert tfkern.attention(half, half, half, alibi_slopes=torch.rand(2, device=device).half()).dtype == torch.bfloat16


@triton.jit
def _places(score, b, h, i, j):
    if h == 1:
        score = score * 0.5
    near = (i - j) % 3
    return score + near.to(tl.float32) + ((j - i) // 4).to(tl.float32) + b


@triton.jit
def _places_derivative(score, b, h, i, j):
    factor = 1.0
    if h == 1:
        factor = 0.5
    return tl.zeros_like(score) + factor


@triton.jit
def _only_distance(score, b, h, i, j):
    return -triton.language.abs(i - j).to(tl.float32)


@triton.jit
def _nothing(score, b, h, i, j):
    return 0.0 * score


def test_a_score_mod_means_the_same_on_tensors(qkv):
    """Numbers are numbers, % and // round towards zero, a value may ignore the score; by hand, since both backends and the
    oracle run the same functions."""
    i, j = torch.arange(20)[:, None], torch.arange(40)
    s = (qkv[0] @ qkv[1].mT) / 8**0.5
    heads = torch.tensor([1.0, 0.5])[:, None, None]
    b = torch.arange(2.0)[:, None, None, None]
    want = torch.softmax(s * heads + torch.fmod(i - j, 3) + ((j - i) / 4).trunc() + b, -1) @ qkv[2]
    far = torch.softmax(-(i - j).abs().float(), -1) @ qkv[2]
    for backend in ("portable", "eager"):
        found = tfkern.attention(*qkv, score_mod=(_places, _places_derivative), backend=backend)
        close(found, want)
        for x, y in zip(
            torch.autograd.grad(found.sum(), qkv), torch.autograd.grad(want.sum(), qkv, retain_graph=True), strict=True
        ):
            close(x, y)
        close(tfkern.attention(*qkv, score_mod=(_only_distance, _nothing), backend=backend), far)
