"""The autograd contract: what flows, what is refused, what memory results lie in."""

import pytest
import torch

import tfkern
from tfkern import reference


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


@pytest.mark.parametrize("backend", ["portable", "eager"])
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


@pytest.mark.parametrize("backend", ["portable", "eager"])
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


@pytest.mark.parametrize("backend", ["portable", "eager"])
def test_changing_a_result_in_place(qkv, backend):
    """Allowed, as with PyTorch's attention; and as there, a backward that would need the old values says so."""
    for options in ({}, dict(window=(5, 5))):
        out = tfkern.attention(*qkv, backend=backend, **options)
        out += 1.0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), qkv)
