"""What the cases in test_attention.py don't show: masks of any memory, which gradients come back, exactness of what is hidden."""

import pytest
import torch
import triton
import triton.language as tl

import tfkern
from tfkern import reference, score_mods
from tfkern.kernels import score_mods as examples

BACKENDS = pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
B, H, N, M, D = 2, 3, 33, 41, 16


@pytest.fixture
def qkv(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, n, D, generator=generator).to(device).requires_grad_() for n in (N, M, M)]


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=2e-5, atol=2e-5)


MASKS = {
    "one dim": lambda r: r(M),
    "three dims": lambda r: r(H, N, M),
    "no dims": lambda r: r(),
    "transposed": lambda r: r(B, H, M, N).transpose(2, 3),
    "every second key": lambda r: r(B, 1, N, 2 * M)[..., ::2],
    "unaligned": lambda r: r(N * M + 1)[1:].view(N, M),
    "aligned rows": lambda r: r(N, 48)[:, :M],
    "aligned rows, unaligned start": lambda r: r(N, 48)[:, 3 : 3 + M],
    "expanded": lambda r: r(1, 1, N, M).expand(B, H, N, M),
    "keys expanded": lambda r: r(B, 1, N, 1).expand(B, H, N, M),
    "backwards heads first": lambda r: r(H, M, B, N).permute(2, 0, 3, 1),
}


@BACKENDS
@pytest.mark.parametrize("kind", ["bool", "float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", MASKS)
def test_masks_of_any_memory(qkv, memory, kind, backend, device):
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, kind)
    mask = MASKS[memory](lambda *s: torch.randn(s, generator=generator).to(device))
    if dtype == torch.bool:
        mask = mask > -1.0
    elif dtype == torch.bfloat16:
        mask, qkv = mask.bfloat16(), [x.detach().bfloat16().requires_grad_() for x in qkv]
    leaves = qkv if dtype == torch.bool else [*qkv, mask.detach().requires_grad_()]
    mask = leaves[-1] if dtype != torch.bool else mask
    found = torch.autograd.grad(tfkern.attention(*qkv, mask, backend=backend).float().square().sum(), leaves)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    want = reference.attention(*wide[:3], wide[-1] if dtype != torch.bool else mask).square().sum()
    for x, y, leaf in zip(found, torch.autograd.grad(want, wide), leaves, strict=True):
        assert x.dtype == leaf.dtype
        assert x.shape == leaf.shape
        if dtype == torch.bfloat16:
            torch.testing.assert_close(x.float(), y, rtol=0.05, atol=0.1)
        else:
            close(x, y)


@BACKENDS
@pytest.mark.parametrize("which", ["attn_mask", "alibi_slopes", "sinks"])
def test_only_one_argument_needs_a_gradient(qkv, which, backend, device):
    tensors = {"attn_mask": torch.randn(N, M), "alibi_slopes": torch.rand(H), "sinks": torch.randn(H)}
    q, k, v = (x.detach() for x in qkv)
    leaf = tensors[which].to(device).requires_grad_()
    found, want = (
        torch.autograd.grad(f(q, k, v, **{which: leaf}, **options).square().sum(), leaf)[0]
        for f, options in ((tfkern.attention, dict(backend=backend)), (reference.attention, {}))
    )
    close(found, want)


@BACKENDS
def test_gradient_through_lse_reaches_everything(qkv, backend, device):
    extra = dict(attn_mask=torch.randn(H, N, M), alibi_slopes=torch.rand(B, H), sinks=torch.randn(H))
    extra = {name: x.to(device).requires_grad_() for name, x in extra.items()}
    leaves = [*qkv[:2], *extra.values()]
    for f, options in ((tfkern.attention, dict(backend=backend)), (reference.attention, {})):
        lse = f(*qkv, **extra, softcap=2.0, dropout_p=0.5, return_lse=True, **options)[1]
        grads = torch.autograd.grad(lse.square().sum(), leaves)
        if f is tfkern.attention:
            found = grads
    for x, y in zip(found, grads, strict=True):
        close(x, y)


@BACKENDS
def test_gradcheck(backend, device):
    """Numerical derivatives, in float32 for the kernels: coarse, but a wrong term or sign is far coarser."""
    dtype = torch.float64 if backend == "eager" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    leaves = leaf(1, 2, 4, 3), leaf(1, 2, 5, 3), leaf(1, 2, 5, 3), leaf(2, 4, 5), leaf(2), leaf(2)
    value_and_derivative = (examples.signed_log, examples.signed_log_derivative)

    def function(q, k, v, mask, slopes, sinks):
        torch.manual_seed(3)
        return tfkern.attention(
            q, k, v, mask, 0.25, True, softcap=2.0, alibi_slopes=slopes, sinks=sinks, score_mod=value_and_derivative,
            return_lse=True, backend=backend,
        )  # fmt: skip

    coarse = {} if backend == "eager" else dict(eps=1e-2, atol=8e-3, rtol=8e-3, fast_mode=True)
    if backend == "eager":
        assert torch.autograd.gradcheck(function, leaves, **coarse)
    else:
        with pytest.warns(UserWarning, match="double precision"):
            assert torch.autograd.gradcheck(function, leaves, **coarse)


@BACKENDS
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("hidden_by", ["bool", "-inf", "lengths"])
def test_what_is_hidden_from_all_does_not_matter(qkv, hidden_by, poison, backend, device):
    """Keys 7 … hidden from every query, query 5 from every key: whatever they hold, every result has the same bits."""
    keep = torch.ones(N, M, dtype=torch.bool, device=device)
    keep[:, 7:] = keep[5] = False
    options = {
        "bool": dict(attn_mask=keep),
        "-inf": dict(attn_mask=torch.where(keep, 0.3, -torch.inf)),
        "lengths": dict(key_lengths=torch.tensor([7] * B, device=device)),
    }[hidden_by]
    dead_query = slice(5, 6) if hidden_by != "lengths" else slice(0, 0)

    def run(fill):
        q, k, v = (x.detach().clone() for x in qkv)
        k[:, :, 7:] = v[:, :, 7:] = q[:, :, dead_query] = fill
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = tfkern.attention(*leaves, **options, backend=backend)
        do = torch.ones_like(out)
        do[:, :, dead_query] = fill
        return out, *torch.autograd.grad(out, leaves, do)

    for x, y in zip(run(poison), run(0.0), strict=True):
        assert torch.equal(x, y)


@BACKENDS
@pytest.mark.parametrize("what", ["bias +inf", "bias nan", "overflow", "key +inf"])
def test_infinities_behave_as_the_oracle(qkv, what, backend, device):
    q, k, v = (x.detach().clone() for x in qkv)
    bias = torch.zeros(N, M, device=device)
    if what == "bias +inf":
        bias[3, 4] = torch.inf
    elif what == "bias nan":
        bias[3, 4] = torch.nan
    elif what == "overflow":
        q[:, :, 3], k[:, :, 4] = 1e30, 1e30
    else:
        k[0, 1, 4, 2] = torch.inf
    found = tfkern.attention(q, k, v, bias, backend=backend)
    want = reference.attention(q, k, v, bias)
    assert want.isnan().any()
    assert not want.isnan().all()
    assert torch.equal(found.isnan(), want.isnan())
    close(found.nan_to_num(), want.nan_to_num())


@BACKENDS
@pytest.mark.parametrize("sink", [-torch.inf, 30.0, -30.0], ids=str)
def test_extreme_sinks(qkv, sink, backend, device):
    sinks = torch.full((H,), sink, device=device, requires_grad=True)
    results = []
    for f, options in ((tfkern.attention, dict(backend=backend)), (reference.attention, {})):
        out, lse = f(*qkv, sinks=sinks, window=(2, 2), return_lse=True, **options)
        keep = torch.isfinite(lse)
        results.append((out, lse, *torch.autograd.grad(out.sum() + lse[keep].sum(), [*qkv, sinks])))
    for x, y in zip(*results, strict=True):
        close(x, y.nan_to_num() if sink == -torch.inf and y.shape == (H,) else y)


@BACKENDS
def test_softcap_is_exact_near_zero_and_far_out(backend, device):
    """tanh to the last bits everywhere: tiny scores pass unchanged, huge ones reach the cap."""
    scores = torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 0.3, 0.549, 0.551, 1.0, 5.0, 20.0, 1e4, 3e38], device=device)
    q = torch.cat([scores, -scores])[None, None, :, None]
    k = torch.ones(1, 1, 1, 1, device=device)
    lse = tfkern.attention(q, k, k, scale=1.0, softcap=1.0, return_lse=True, backend=backend)[1].flatten()
    torch.testing.assert_close(lse, torch.tanh(q.flatten().double()).float(), rtol=3e-7, atol=1e-37)


@triton.jit
def _damp(s, j):
    return s * tl.exp(-0.1 * j.to(tl.float32))


@triton.jit
def damped_value(score, b, h, i, j):
    return tl.where(score > 0.0, _damp(score, j), tl.minimum(score, 0.0) * 0.5)


@triton.jit
def damped_derivative(score, b, h, i, j):
    return tl.where(score > 0.0, _damp(1.0 + tl.zeros_like(score), j), 0.5)


@triton.jit
def unknown_to_eager(score, b, h, i, j):
    return tl.cumsum(score, 0)


@BACKENDS
def test_score_mod_may_call_jit_functions(qkv, backend, device):
    def formula(q, k, v):
        s = (q @ k.mT) / D**0.5
        s = torch.where(s > 0, s * torch.exp(-0.1 * torch.arange(M, device=device)), 0.5 * s)
        return torch.softmax(s, -1) @ v

    found = tfkern.attention(*qkv, score_mod=(damped_value, damped_derivative), backend=backend)
    close(found, formula(*qkv))
    grads = (torch.autograd.grad(x.square().sum(), qkv) for x in (found, formula(*qkv)))
    for x, y in zip(*grads, strict=True):
        close(x, y)


def test_eager_names_what_it_does_not_know(qkv):
    with pytest.raises(NotImplementedError, match=r"uses tl\.cumsum, which the backend eager does not know"):
        tfkern.attention(*qkv, score_mod=(unknown_to_eager, unknown_to_eager), backend="eager")


@pytest.mark.parametrize("name", ["signed_log", "cooling"])
def test_derivatives_of_the_examples(name):
    value, derivative = (score_mods.as_torch(getattr(examples, name + end)) for end in ("", "_derivative"))
    s = torch.linspace(-4, 4, 30, dtype=torch.float64, requires_grad=True)
    i, j = torch.arange(30), torch.arange(30).flip(0)
    (want,) = torch.autograd.grad(value(s, 1, 2, i, j).sum(), s)
    torch.testing.assert_close(derivative(s, 1, 2, i, j) * torch.ones(30), want, rtol=1e-6, atol=1e-6, check_dtype=False)


@BACKENDS
@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_scale_as_a_tensor_is_the_number(qkv, scale, backend, device):
    """Of any floating-point dtype, with or without dims."""
    want = tfkern.attention(*qkv, scale=scale, is_causal=True, backend="portable")
    for tensor in (torch.tensor(scale, device=device), torch.tensor([[scale]], dtype=torch.float64, device=device)):
        close(tfkern.attention(*qkv, scale=tensor, is_causal=True, backend=backend), want)


@BACKENDS
def test_causal_together_with_a_mask(qkv, backend, device):
    mask = torch.randn(B, 1, 1, M, device=device)
    keep = torch.ones(N, M, dtype=torch.bool, device=device).tril()
    want = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask.masked_fill(~keep, -torch.inf))
    close(tfkern.attention(*qkv, mask, is_causal=True, backend=backend), want)


def test_autocast_takes_masks_along(qkv, device):
    mask = torch.randn(N, M, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = tfkern.attention(*qkv, mask)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert mask.grad.dtype == torch.float32


@pytest.mark.parametrize(  # the interpreter takes many minutes; the grid has one dimension, see test_addresses.py
    "backend", [pytest.param("portable", marks=pytest.mark.gpu), "eager"]
)
def test_more_batch_times_heads_than_a_grid_has_rows(backend, device):
    """65,535 is the most that a grid's second and third dimension take."""
    q = torch.randn(700, 100, 1, 16, device=device)
    close(tfkern.attention(q, q, q, backend=backend), q)
