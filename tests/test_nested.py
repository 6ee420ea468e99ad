"""Jagged nested tensors."""

import pytest
import torch

import tfkern

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def make(device, heads=2, lengths=(5, 1, 12), d=16):
    parts = [torch.randn(n, heads, d, device=device) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
def test_is_each_sequence_by_itself(backend, device):
    x = make(device)
    q = x.transpose(1, 2)
    out, lse = tfkern.attention(q, q, q, is_causal=True, return_lse=True, backend=backend)
    assert out.is_nested
    assert out.layout == torch.jagged
    assert lse.shape == (2, 18)
    for found, part in zip(out.unbind(), x.unbind(), strict=True):
        alone = part.transpose(0, 1)[None]
        torch.testing.assert_close(found, tfkern.attention(alone, alone, alone, is_causal=True)[0], rtol=1e-5, atol=1e-5)
    out.values().square().sum().backward()
    assert x.grad.is_nested
    leaf = x.detach().values().requires_grad_()
    again = tfkern.attention_varlen(leaf, leaf, leaf, x.offsets(), x.offsets(), is_causal=True, backend=backend)
    again.square().sum().backward()
    torch.testing.assert_close(x.grad.values(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_result_meets_the_query_again(device):
    """out and query share their ragged dim: they add up."""
    q = make(device).transpose(1, 2)
    assert (tfkern.attention(q, q, q) + q).is_nested


def test_messages(device):
    x = make(device)
    q = x.transpose(1, 2)
    dense = torch.randn(3, 2, 5, 16, device=device)
    with pytest.raises(ValueError, match=r"key must be a nested tensor \(B, H, ragged, D\)"):
        tfkern.attention(q, dense, dense)
    with pytest.raises(ValueError, match=r"query must be \(B, H, ragged, D\), but dim 1 is the ragged one"):
        tfkern.attention(x, x, x)
    with pytest.raises(ValueError, match="key_lengths can't be given with nested tensors"):
        tfkern.attention(q, q, q, key_lengths=torch.ones(3, dtype=torch.int32, device=device))
