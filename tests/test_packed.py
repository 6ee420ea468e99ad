"""Packed sequences, and queries, keys and values in one tensor."""

import pytest
import torch

import tfkern
from tfkern import reference

BACKENDS = pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
LENGTHS = (17, 0, 40, 1, 9)


def cu(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=2e-5, atol=2e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_is_each_sequence_by_itself(backend, dtype, device):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), 2, 16, generator=generator).to(device) for _ in range(3))
    ends = cu(LENGTHS, device, dtype)
    found, lse = tfkern.attention_varlen(q, k, v, ends, ends, is_causal=True, return_lse=True, backend=backend)
    assert lse.shape == (2, sum(LENGTHS))
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        part = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        want, want_lse = tfkern.attention(*part, is_causal=True, return_lse=True, backend=backend)
        close(found[start:stop], want[0].transpose(0, 1))
        close(lse[:, start:stop], want_lse[0])


@BACKENDS
def test_rows_of_no_sequence(backend, device):
    """Buffers longer than what is in them: the rest, whatever it holds, gives 0, gets gradient 0 and touches nothing."""
    generator = torch.Generator().manual_seed(0)
    fine = [torch.randn(90, 2, 16, generator=generator).to(device) for _ in range(3)]
    sinks = torch.randn(2, generator=generator).to(device)

    def run(fill):
        leaves = [x.clone() for x in fine]
        for x in leaves:
            x[sum(LENGTHS) :] = fill
        leaves = [x.requires_grad_() for x in (*leaves, sinks)]
        ends = cu(LENGTHS, device)
        out, lse = tfkern.attention_varlen(*leaves[:3], ends, ends, sinks=leaves[3], return_lse=True, backend=backend)
        do, dlse = torch.ones_like(out), torch.ones_like(lse)
        do[sum(LENGTHS) :] = dlse[:, sum(LENGTHS) :] = fill
        return out, lse, *torch.autograd.grad([out, lse], leaves, [do, dlse])

    found = run(float("nan"))
    for x, y in zip(found, run(0.0), strict=True):
        assert torch.equal(x, y)
    assert (found[0][sum(LENGTHS) :] == 0).all()
    assert (found[1][:, sum(LENGTHS) :] == -torch.inf).all()
    for gradient in found[2:5]:
        assert (gradient[sum(LENGTHS) :] == 0).all()


def test_garbage_in_cu_seqlens_stays_inside_the_tensors(device, monkeypatch):
    """On a GPU the values are not looked at. Every row is still written, and nothing else."""
    from tfkern import checks

    for name in ("cu_seqlens", "cu_seqlens_values"):
        monkeypatch.setattr(checks, name, lambda *args: None)
    q, k, v = (torch.randn(50, 1, 16, device=device) for _ in range(3))
    padded = torch.full((150, 1, 16), float("nan"), device=device)
    inner = [padded.clone() for _ in range(3)]
    for x, y in zip(inner, (q, k, v), strict=True):
        x[50:100] = y
    for garbage in ([0, 70, 20], [-5, 30, 1000], [40, 50, 50], [0, 0, 0]):
        ends = torch.tensor(garbage, device=device)
        found = tfkern.attention_varlen(*(x[50:100] for x in inner), ends, ends, backend="portable")
        assert found.isfinite().all(), garbage


@BACKENDS
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("varlen", [False, True], ids=["batch", "varlen"])
def test_one_tensor(varlen, strided, backend, device):
    generator = torch.Generator().manual_seed(0)
    shape = (sum(LENGTHS), 3, 2, 16) if varlen else (2, 30, 3, 2, 16)
    if strided:
        x = torch.randn(*shape[:-1], 32, generator=generator).to(device)[..., ::2]
    else:
        x = torch.randn(*shape, generator=generator).to(device)
    options = dict(cu_seqlens=cu(LENGTHS, device)) if varlen else dict(key_lengths=torch.tensor([30, 11], device=device))
    qkv = x.detach().requires_grad_()
    out, lse = tfkern.attention_packed(qkv, is_causal=True, return_lse=True, backend=backend, **options)
    assert out.is_contiguous()
    assert out.shape == (*shape[:-3], 2, 16)
    if varlen:
        want, want_lse = reference.attention_varlen(
            *x.unbind(1), options["cu_seqlens"], options["cu_seqlens"], is_causal=True, return_lse=True
        )  # fmt: skip
    else:
        q, k, v = x.permute(2, 0, 3, 1, 4)
        want, want_lse = reference.attention(q, k, v, is_causal=True, return_lse=True, **options)
        want = want.transpose(1, 2)
    close(out, want)
    close(lse, want_lse)
    leaf = x.clone().requires_grad_()
    if varlen:
        again = reference.attention_varlen(*leaf.unbind(1), options["cu_seqlens"], options["cu_seqlens"], is_causal=True)
    else:
        again = reference.attention(*leaf.permute(2, 0, 3, 1, 4), is_causal=True, **options).transpose(1, 2)
    (found,) = torch.autograd.grad(out.square().sum(), qkv)
    (truth,) = torch.autograd.grad(again.square().sum(), leaf)
    close(found, truth)


@BACKENDS
def test_one_tensor_copies_nothing(backend, device, monkeypatch):
    """The kernels read the three where they lie and write their gradients side by side."""
    from tfkern import backends

    seen = {}
    forward, backward = backends.BACKENDS[backend].forward, backends.BACKENDS[backend].backward

    def spy_forward(problem, tensors):
        seen["read"] = [x.untyped_storage().data_ptr() for x in tensors[:3]]
        return forward(problem, tensors)

    def spy_backward(*args, into=None):
        seen["written"] = [x.untyped_storage().data_ptr() for x in into]
        return backward(*args, into=into)

    spies = backends.BACKENDS[backend]._replace(forward=spy_forward, backward=spy_backward)
    monkeypatch.setitem(backends.BACKENDS, backend, spies)
    qkv = torch.randn(2, 20, 3, 2, 16, device=device, requires_grad=True)
    out = tfkern.attention_packed(qkv, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert seen["read"] == [qkv.untyped_storage().data_ptr()] * 3
    assert seen["written"] == [gradient.untyped_storage().data_ptr()] * 3
    assert gradient.is_contiguous()


@BACKENDS
def test_one_tensor_with_a_bias_alone_needing_a_gradient(backend, device):
    qkv = torch.randn(2, 20, 3, 2, 16, device=device)
    bias = torch.randn(2, 20, 20, device=device, requires_grad=True)
    (found,) = torch.autograd.grad(tfkern.attention_packed(qkv, bias, backend=backend).square().sum(), bias)
    (want,) = torch.autograd.grad(reference.attention(*qkv.permute(2, 0, 3, 1, 4), bias).square().sum(), bias)
    close(found, want)


def test_lengths_are_not_read_on_the_host(device, monkeypatch):
    """The kernels' way to the launch asks no tensor for its values. (On a CPU the check of cu_seqlens does, and is left out.)"""
    from tfkern import call, checks
    from tfkern.backends import portable

    monkeypatch.setattr(checks, "cu_seqlens", lambda *args: None)
    q = torch.randn(30, 2, 16, device=device)
    ends = cu((10, 20), device)
    launched = []
    monkeypatch.setattr(portable.launch.Launch, "__call__", lambda self, *features, **tensors: launched.append(self.grid))
    for name in ("item", "tolist", "__int__", "__bool__", "__float__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name: pytest.fail(f"{name} of a tensor"))
    p, t = call.build(
        q, q, q, cu_seqlens_q=ends, cu_seqlens_k=ends, dropout_p=0.1, sinks=torch.zeros(2), alibi_slopes=torch.zeros(2, 2)
    )
    out, stats = portable.forward(p, t)
    portable.backward(p, t, out, stats, out, stats[:, :, 1], [True, True, True, False, True, True])
    assert len(launched) == 3
