"""Very large biases, scores and sinks, and other values at the ends of their range."""

import pytest
import torch
import triton
import triton.language as tl

import tfkern
from tfkern import call, reference, testing
from tfkern.backends import BACKENDS as BACKENDS_BY_NAME
from tfkern.backends import hopper
from tfkern.testing import budget

BACKENDS = pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_gradients_of_rows_that_a_finite_mask_hides(size, dtype, backend, device):
    """Each weighs 1/64 in such a row, and its lse is that of the mask alone."""
    q, k, v = (torch.zeros(1, 1, n, 8, dtype=dtype, device=device) for n in (4, 64, 64))
    v, leaves = v.normal_(generator=torch.Generator().manual_seed(0)), (q, k, v)
    mask = torch.zeros(4, 64, device=device)
    mask[0] = max(size, torch.finfo(dtype).min)
    do = torch.zeros_like(q)
    do[:, :, 0] = 1.0
    mask = mask.to(dtype) if dtype != torch.float32 else mask
    out = tfkern.attention(*(x.requires_grad_() for x in leaves), mask, backend=backend)
    (dv,) = torch.autograd.grad(out, v, do)
    assert torch.equal(dv, torch.full_like(dv, 1 / 64))


HIDING = {
    "plain": {}, "causal": dict(is_causal=True), "window": dict(window=(9, 4)), "softcap": dict(softcap=2.0),
    "slopes": dict(alibi_slopes=torch.rand(2)), "dropout": dict(dropout_p=0.3), "sinks": dict(sinks=torch.randn(2)),
    "hidden sinks": dict(sinks=torch.full((2,), -1e9)), "padded": dict(key_lengths=torch.tensor([40, 7])),
    "scale": dict(scale=torch.tensor(-0.4)),
}  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("options", HIDING.values(), ids=HIDING.keys())
def test_every_gradient_beside_rows_that_a_finite_mask_hides(qkv, options, backend, device):
    """Whatever else is there: as autograd of the naive formula, where each of its rows is a softmax of its own."""
    bias = torch.randn(2, 1, 20, 40, generator=torch.Generator().manual_seed(0)).to(device)
    bias[1, :, 3:9] = torch.finfo(torch.float32).min
    bias[0, :, 11] = -1e9
    bias[0, :, 12:, 5:] = -1e9
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    leaves = [
        *qkv,
        bias.requires_grad_(),
        *(x.requires_grad_() for name, x in options.items() if name in ("alibi_slopes", "sinks")),
    ]
    do = torch.randn(2, 2, 20, 8, generator=torch.Generator().manual_seed(1)).to(device)
    grads = []
    for function, more in ((tfkern.attention, dict(backend=backend)), (reference.attention, {})):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(function(*qkv, bias, **options, **more), leaves, do))
    for x, y in zip(*grads, strict=True):
        close(x, y)


@BACKENDS
def test_packed_rows_that_a_finite_mask_hides(backend, device):
    q, k, v = (torch.randn(n, 2, 8, device=device, requires_grad=True) for n in (9, 60, 60))
    ends = [torch.tensor(x, device=device) for x in ([0, 5, 9], [0, 40, 60])]
    mask = torch.zeros(2, 1, 5, 40, device=device)
    mask[:, :, 1] = torch.finfo(torch.float32).min
    grads = [
        torch.autograd.grad(f(q, k, v, *ends, mask, **o).square().sum(), (q, k, v))
        for f, o in ((tfkern.attention_varlen, dict(backend=backend)), (reference.attention_varlen, {}))
    ]
    for x, y in zip(*grads, strict=True):
        close(x, y)


@BACKENDS
@pytest.mark.parametrize("factor", [1e3, 1e5, 1e8])
@pytest.mark.parametrize("dim", [24, 64])
@pytest.mark.parametrize("scale", [None, -0.3])
def test_gradients_of_large_logits(factor, dim, scale, backend, device):
    """Every query has one key, and the gradient of a value is how many chose it."""
    generator = torch.Generator().manual_seed(dim)
    q, k, v = ((torch.randn(1, 2, n, dim, generator=generator) * factor).to(device).requires_grad_() for n in (9, 33, 33))
    options = dict(scale=scale, window=(40, 40))  # which PyTorch's own kernels have not
    out, lse = tfkern.attention(q, k, v, **options, return_lse=True, backend=backend)
    logits = reference.logits(q.double(), k.double(), **options)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    chosen = torch.nn.functional.one_hot(logits.argmax(-1), 33).sum(2)
    assert torch.equal(dv, chosen[..., None].expand_as(dv).to(dv))
    assert all(x.isfinite().all() for x in (dq, dk))
    torch.testing.assert_close(lse.double(), logits.amax(-1), rtol=1e-6, atol=0)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [30, 1000])
@pytest.mark.parametrize("name", ["causal", "bias"])
def test_the_budget_holds_for_large_logits(name, size, dtype, backend, device):
    """As large as `size` times what they usually are."""
    case = next(c for c in (*testing.CASES, *testing.FEATURE_CASES) if c.name == name)
    inputs = testing.make_inputs(case, dtype, device)
    for tensors in (inputs.tensors, inputs.clean):
        tensors["query"] = tensors["query"] * size
    for error in budget.assess(case, inputs, testing.results(tfkern.attention, inputs, backend=backend)):
        assert error.ok, str(error)


@BACKENDS
@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(window=(40, 40))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [300.0, 1e5])
def test_gradients_of_large_equal_logits(size, dtype, options, backend, device):
    """Keys that are alike share a row's weight: its log is lost beside a logit of 1e10."""
    n = 32
    v, do = (torch.randn(1, 1, n, 24, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    v, do = v.to(dtype).to(device).requires_grad_(), do.to(dtype).to(device)
    q, k = (torch.full((1, 1, n, 24), size, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    found = torch.autograd.grad(tfkern.attention(q, k, v, **options, backend=backend), (q, k, v), do)
    weights = reference.attention_weights(q.double(), k.double(), **options)[0]
    # A sum's error is a part of the sum of what it adds up, whatever the CPU's order of adding, which may cancel.
    bound = 2 * torch.finfo(dtype).eps * (1 + weights.mT @ do.double().abs())
    assert ((found[2].double() - weights.mT @ do.double()).abs() <= bound).all()
    assert all(x.isfinite().all() for x in found)


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


@pytest.mark.cpu  # beside PyTorch's fused attention for CPUs
@pytest.mark.parametrize(
    ("backend", "options", "part"), [("portable", {}, 0.4), ("eager", dict(window=(64, 64)), 0.25)], ids=str
)
def test_delta_is_not_that_of_a_rounded_output(backend, options, part):
    """Nearly one-hot rows in bfloat16, values with a mean: where all keys of a query are at hand delta is the sum of P * dP, and
    dQ and dK err by `part` at most of what they do in PyTorch's fused attention, which takes it from O."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 2, 64, 64, generator=generator) for _ in range(4))
    q, k, v, do = (x.bfloat16() for x in (q * 6, k, v + 4, do))

    def gradients(function, dtype=torch.bfloat16, **more):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(function(*leaves, **more), leaves[:2], do.to(dtype))

    truth = gradients(reference.attention, torch.float64)
    found = gradients(tfkern.attention, backend=backend, **options)
    for x, y, right in zip(found, gradients(torch.nn.functional.scaled_dot_product_attention), truth, strict=True):
        assert (x - right).abs().max() <= part * (y - right).abs().max()


ROUNDED = {
    "plain": {}, "causal": dict(is_causal=True), "window": dict(window=(60, 3)), "dropout": dict(dropout_p=0.2),
    "sinks": dict(sinks=torch.tensor([1.0, -2.0])), "bias": dict(attn_mask=torch.linspace(-1, 1, 150).bfloat16()),
}  # fmt: skip


def rounded(device, dim=40, rows=140, keys=150):
    """q, k, v, do in bfloat16 of rows that are nearly one-hot, and values with a mean."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 2, n, dim, generator=generator) for n in (rows, keys, keys, rows))
    return [x.bfloat16().to(device) for x in (q * 6, k, v + 4, do)]


@BACKENDS
@pytest.mark.parametrize("options", ROUNDED.values(), ids=ROUNDED.keys())
def test_gradients_where_the_output_is_not_rounded(options, backend, device):
    """precise_delta: every gradient within 0.6 % of its largest entry; in the kernels dQ and dK are off by half at most of what
    they are without it."""
    *qkv, do = rounded(device)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}

    def gradients(function, dtype=torch.bfloat16, **more):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        torch.manual_seed(0)
        return torch.autograd.grad(function(*leaves, **options | more), leaves, do.to(dtype))

    truth = gradients(reference.attention, torch.float64)
    found, without = (gradients(tfkern.attention, backend=backend, precise_delta=on) for on in (True, False))
    for x, right in zip(found, truth, strict=True):
        assert (x - right).abs().max() <= 0.006 * right.abs().max()
    for x, y, right in zip(found[:2], without, truth, strict=False):
        assert backend != "portable" or (x - right).abs().max() <= 0.5 * (y - right).abs().max()


@pytest.mark.parametrize("dims", [(40, 40), (16, 5), (24, 64)], ids=str)
@pytest.mark.parametrize("ends", [None, [0, 3, 3, 70, 139]], ids=["batch", "packed"])
def test_what_the_output_lost_when_it_was_rounded(dims, ends, device):
    """It stands behind the stats, row by row, to 16 bits more, and brings the output within 2^-15 of what it was (portable)."""
    q, k, v = (torch.randn(1, 2, 140, dim, device=device).bfloat16() for dim in (dims[0], *dims))
    options = dict(backend="portable")
    if ends is None:
        problem, tensors = call.build(q, k, v, precise_delta=True)
        exact = tfkern.attention(q.float(), k.float(), v.float(), **options)
    else:
        ends = torch.tensor(ends, device=device)
        *rows, ends_q, ends_k = *(x[0].transpose(0, 1) for x in (q, k, v)), ends, ends
        problem, tensors = call.build(*rows, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, precise_delta=True)
        exact = tfkern.attention_varlen(*(x.float() for x in rows), ends_q, ends_k, **options).transpose(0, 1)[None]
    out, stats = BACKENDS_BY_NAME["portable"].forward(problem, tensors)
    there = slice(0, 140 if ends is None else 139)
    width = 2 * (problem.stats_rows - 2)
    lost = stats[:, :, 2:].flatten(2).view(torch.bfloat16).view(1, 2, 140, width)[:, :, there, : dims[1]]
    assert stats.shape[2] == 2 + (dims[1] + 1) // 2
    assert lost.abs().max() > 0
    whole = out[:, :, there].float() + lost.float()
    # Weights are rounded to bfloat16 for their product with values, in float32 they are not.
    assert (whole - exact[:, :, there]).abs().mean() < 0.7 * (out[:, :, there].float() - exact[:, :, there]).abs().mean()


def test_what_precise_delta_leaves_as_it_is(device):
    """The output and lse in 16 bits; everything in float32, where nothing more is kept."""
    *qkv, do = rounded(device)
    for backend in ("portable", "eager"):
        with_it, without = (
            tfkern.attention(*qkv, precise_delta=on, return_lse=True, backend=backend, window=(200, 200))
            for on in (True, False)
        )
        assert all(torch.equal(x, y) for x, y in zip(with_it, without, strict=True))
        leaves = [x.float().requires_grad_() for x in qkv]
        grads = [
            torch.autograd.grad(tfkern.attention(*leaves, precise_delta=on, backend=backend), leaves, do.float())
            for on in (True, False)
        ]
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert call.build(*(x.float() for x in qkv), precise_delta=True)[0].stats_rows == 2


def test_precise_delta_is_a_flag_and_has_its_backends(device):
    *qkv, _ = rounded(device)
    for value in (1, 0, None, "yes", 1.0):
        with pytest.raises(TypeError, match="precise_delta must be True or False, but is"):
            tfkern.attention(*qkv, precise_delta=value)
    tfkern.attention(*qkv, precise_delta=True)
    with pytest.raises(TypeError, match="precise_delta must be True or False, but is 1"):
        tfkern.attention(*qkv, precise_delta=1)
    assert any("precise_delta" in reason for reason in hopper.limits(call.build(*qkv, precise_delta=True)[0]))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_values_of_one_give_one(sharpness, dtype, backend, device):
    """However the weights were rounded: their sum is of float32, their product with values of 16 bits."""
    generator = torch.Generator().manual_seed(0)
    q, k = ((torch.randn(1, 2, n, 32, generator=generator) * sharpness).to(dtype).to(device) for n in (20, 300))
    out = tfkern.attention(q, k, torch.ones_like(k), backend=backend).float()
    unit = torch.finfo(dtype).eps
    assert (out - 1).abs().max() <= unit / 2
    assert (out - 1).mean().abs() <= unit / 16


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

    for name in ("cu_seqlens", "cu_seqlens_values"):
        monkeypatch.setattr(checks, name, lambda *args: None)
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
