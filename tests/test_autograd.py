"""The autograd contract: what flows, what is refused, what memory results lie in."""

import itertools

import pytest
import torch

import tfkern
from tfkern import call, ops, reference


@pytest.fixture
def qkv(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 20, 16, generator=generator).to(device).requires_grad_() for _ in range(3)]


def test_gradient_of_each_input_alone(qkv):
    for index in range(3):
        tensors = [t.detach().requires_grad_(i == index) for i, t in enumerate(qkv)]
        for backend in ("portable", "eager"):
            (found,) = torch.autograd.grad(tfkern.attention(*tensors, backend=backend).square().sum(), tensors[index])
            (truth,) = torch.autograd.grad(reference.attention(*tensors).square().sum(), tensors[index])
            torch.testing.assert_close(found, truth)


def test_gradient_through_lse_alone(qkv):
    for backend in ("portable", "eager"):
        found = torch.autograd.grad(tfkern.attention(*qkv, return_lse=True, backend=backend)[1].square().sum(), qkv[:2])
        truth = torch.autograd.grad(reference.attention(*qkv, return_lse=True)[1].square().sum(), qkv[:2])
        for f, t in zip(found, truth, strict=True):
            torch.testing.assert_close(f, t)


def test_expanded_gradient(qkv):
    """What sum() sends back has stride 0 everywhere."""
    for backend in ("portable", "eager"):
        found = torch.autograd.grad(tfkern.attention(*qkv, is_causal=True, backend=backend).sum(), qkv)
        truth = torch.autograd.grad(reference.attention(*qkv, is_causal=True).sum(), qkv)
        for f, t in zip(found, truth, strict=True):
            torch.testing.assert_close(f, t)


def test_no_graph_without_need(qkv):
    assert not tfkern.attention(*(t.detach() for t in qkv)).requires_grad
    with torch.no_grad():
        assert not tfkern.attention(*qkv).requires_grad


def test_higher_derivatives_are_refused(qkv):
    grads = torch.autograd.grad(tfkern.attention(*qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(grads[0].sum(), qkv[0])
    plain = [t.detach() for t in qkv]
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(tfkern.attention, tuple(plain), tuple(plain))


def test_func_grad(qkv):
    plain = [t.detach() for t in qkv]
    found = torch.func.grad(lambda *t: tfkern.attention(*t).square().sum(), (0, 1, 2))(*plain)
    truth = torch.autograd.grad(reference.attention(*qkv).square().sum(), qkv)
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t)


@pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)], ids=str)
def test_results_keep_the_memory_order_of_their_inputs(backend, order, device):
    """B, H, N in any order in memory: out as query, each gradient as its input, all dense."""
    sizes = (2, 3, 20)
    inverse = [order.index(d) for d in range(3)]
    q, k, v = (
        torch.randn(*(sizes[d] for d in order), dim, device=device).permute(*inverse, 3).requires_grad_()
        for dim in (16, 16, 24)
    )
    out = tfkern.attention(q, k, v, backend=backend)
    assert out.shape == (*sizes, 24)
    assert [d for d in sorted(range(3), key=lambda d: -out.stride(d))] == list(order)
    assert out.permute(*order, 3).is_contiguous()
    for x, g in zip((q, k, v), torch.autograd.grad(out.square().sum(), (q, k, v)), strict=True):
        assert g.stride() == x.stride()


def test_projection_after_bnhd_query_needs_no_copy():
    qkv = torch.randn(2, 20, 3, 4, 16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = tfkern.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_mixed_inputs(device_dtype, device):
    q = torch.randn(1, 2, 8, 16, device=device, requires_grad=True)
    k = torch.randn(1, 2, 8, 16, device=device).to(device_dtype)
    with torch.autocast(device, dtype=device_dtype):
        out = tfkern.attention(q, k, k)
        wide = tfkern.attention(*(x.double() for x in (q, k, k)))
    assert out.dtype == device_dtype
    assert wide.dtype == torch.float64
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    with pytest.raises(TypeError, match="key must have the dtype of query"):
        tfkern.attention(q, k, k)


@pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
def test_autocast_does_not_reach_into_the_backend(qkv, backend, device):
    """Products inside stay as wide as they are without autocast; a backward inside it too."""
    narrow = [t.detach().bfloat16() for t in qkv]
    options = dict(window=(5, 5), return_lse=True, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tfkern.attention(*narrow, **options)
    for x, y in zip(inside, tfkern.attention(*narrow, **options), strict=True):
        assert torch.equal(x, y)
    out = tfkern.attention(*qkv, window=(5, 5), backend=backend).square().sum()
    outside = torch.autograd.grad(out, qkv, retain_graph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = torch.autograd.grad(out, qkv)
    for x, y in zip(inside, outside, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
def test_changing_a_result_in_place(qkv, backend):
    """Allowed, as with PyTorch's attention; and as there, a backward that would need the old values says so."""
    for options in ({}, dict(window=(5, 5))):
        out = tfkern.attention(*qkv, backend=backend, **options)
        out += 1.0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), qkv)


def turned(q, k, v):
    return tfkern.attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, return_lse=True)


def last_dim_apart(q, k, v):
    return tfkern.attention(*(x.mT for x in (q, k, v)), dropout_p=0.3)


def together(q, k, v):
    return tfkern.attention_packed(torch.stack((q, k, v), 2).transpose(0, 1))


def behind_each_other(q, k, v):
    cu = torch.tensor([0, 2, 5])
    return tfkern.attention_varlen(q[0], k[0], v[0], cu, cu, sinks=q[0, 0, :, 0], alibi_slopes=k[0, 0, :, 0])


def by_the_op(q, k, v):
    return torch.ops.tfkern.attention(*itertools.chain(*ops.op_arguments(*call.given(q, k, v))))


@pytest.mark.parametrize("f", [turned, last_dim_apart, together, behind_each_other, by_the_op], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["eager", pytest.param("portable", marks=pytest.mark.slow)])
def test_batched_gradients(f, backend, monkeypatch):
    """Several gradients of one forward (is_grads_batched), of tensors of any strides."""
    monkeypatch.setenv("TFKERN_BACKENDS", backend)
    leaves = [torch.randn(2, 5, 3, 4, dtype=torch.float32, requires_grad=True) for _ in range(3)]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    several = [torch.randn(3, *x.shape) for x in out]
    found = torch.autograd.grad(out, leaves, several, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        wanted = torch.autograd.grad(out, leaves, [x[n] for x in several], retain_graph=True)
        torch.testing.assert_close([x[n] for x in found], list(wanted))


def test_gradcheck_of_batched_gradients():
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: turned(x, x, x), x, check_batched_grad=True)
