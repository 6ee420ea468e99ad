"""Where ours refuse what PyTorch refuses, the error is of its type and its message begins with PyTorch's sentence: code and tests
match those words."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

import tfkern

Q, KV = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 7, 8)
ONE = torch.randn(8)
LOWER = causal_lower_right(6, 7)
# What PyTorch refuses on every backend, and how much of its message is its own and not of the values that came.
SDPA = {
    "both": ("Explicit attn_mask should not be set when is_causal=True", (Q, Q, Q, torch.zeros(6, 6)), dict(is_causal=True)),
    "bias and causal": ("CausalBias should not be used with causal=True", (Q, KV, KV, LOWER), dict(is_causal=True)),
    "dtype": ("Expected query, key, and value to have the same dtype, but got", (Q, Q.double(), Q), {}),
    "dtype with a bias": ("Expected query, key, and value to have the same dtype, but got", (Q, KV.double(), KV, LOWER), {}),
    "device": ("Expected query, key, and value to have the same device type, but got", (Q, Q.to("meta"), Q), {}),
    "device with a bias": (
        "Expected query, key, and value to have the same device type, but got", (Q, KV.to("meta"), KV, LOWER), {}
    ),
    "dims": ("Expected query, key, and value to all be  at least 2 dimensional, but got", (ONE, ONE, ONE), {}),
    "dims with a bias": ("Expected query, key, and value to all be  at least 2 dimensional, but got", (ONE, KV, KV, LOWER), {}),
    "mask": ("Expected attn_mask dtype to be bool or float or to match query dtype", (Q, Q, Q, torch.zeros(6, 6).double()), {}),
    "integers": ("Expected attn_mask dtype to be bool or float or to match query dtype", (Q, Q, Q, torch.zeros(6, 6).long()), {}),
    "heads": ("Number of heads in key and value must divide the number of heads in", (Q, Q[:, :3], Q[:, :3]), dict(enable_gqa=True)),
    "dropout": ("dropout probability has to be between 0 and 1, but got 1.5", (Q, Q, Q), dict(dropout_p=1.5)),
    "list": ("scaled_dot_product_attention(): argument 'key' (position 2) must be Tensor, not list", (Q, [1], Q), {}),
    "causal": ("scaled_dot_product_attention(): argument 'is_causal' must be bool, not str", (Q, Q, Q), dict(is_causal="no")),
    "scale": ("scaled_dot_product_attention(): argument 'scale' must be float, not str", (Q, Q, Q), dict(scale="no")),
    "scale with grad": (
        "scaled_dot_product_attention(): argument 'scale' must be float, not Tensor", (Q, Q, Q),
        dict(scale=torch.ones((), requires_grad=True)),
    ),
}  # fmt: skip


def error_of(function, arguments, options) -> Exception | None:
    try:
        function(*arguments, **options)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", SDPA)
def test_scaled_dot_product_attention(name):
    words, arguments, options = SDPA[name]
    error = error_of(tfkern.scaled_dot_product_attention, arguments, options)
    assert str(error).startswith(words)
    theirs = error_of(F.scaled_dot_product_attention, arguments, options)
    if name == "both":  # its fused CPU path takes them; its other paths raise so
        theirs = error_of(torch.ops.aten._scaled_dot_product_attention_math, arguments, options)
    assert str(theirs).removeprefix("_scaled_dot_product_attention: ").startswith(words)
    assert type(error) is type(theirs)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.bool)


X, FLAT = torch.randn(5, 2, 16), torch.randn(5, 16)
MHA = {
    "query's dims": ((ONE,) * 3, {}),
    "key's dims": ((X, FLAT, FLAT), {}),
    "unbatched": ((FLAT, X, X), {}),
    "width": ((X[..., :15],) * 3, {}),
    "lengths": ((X, X, torch.randn(6, 2, 16)), {}),
    "padding's dtype": ((X, X, X), dict(key_padding_mask=zeros(2, 5).long())),
    "padding's batch": ((X, X, X), dict(key_padding_mask=zeros(3, 5))),
    "padding's length": ((X, X, X), dict(key_padding_mask=zeros(2, 4))),
    "padding's dims": ((X, X, X), dict(key_padding_mask=zeros(5))),
    "unbatched padding": ((FLAT,) * 3, dict(key_padding_mask=zeros(2, 5))),
    "mask's dtype": ((X, X, X), dict(attn_mask=zeros(5, 5).long())),
    "mask's other dtype": ((X, X, X), dict(attn_mask=zeros(5, 5).double())),
    "mask's shape": ((X, X, X), dict(attn_mask=zeros(5, 6))),
    "mask of heads": ((X, X, X), dict(attn_mask=zeros(3, 5, 5))),
    "mask's dims": ((X, X, X), dict(attn_mask=zeros(1, 1, 5, 5))),
    "unbatched mask": ((FLAT,) * 3, dict(attn_mask=zeros(3, 5, 5))),
    "hint without mask": ((X, X, X), dict(is_causal=True)),
}


@pytest.mark.parametrize("name", MHA)
def test_multihead_attention(name):
    arguments, options = MHA[name]
    layer = nn.MultiheadAttention(16, 2)
    theirs = error_of(layer, arguments, dict(need_weights=False, **options))
    error = error_of(tfkern.nn.MultiheadAttention.from_torch(layer), arguments, dict(need_weights=False, **options))
    assert type(error) is type(theirs)
    sentence = str(theirs).split(". You may")[0].split(" instead")[0].replace("long int", "").replace("double", "torch.float64")
    assert str(error).startswith(sentence.split("query.dtype")[0])


@pytest.mark.parametrize("shapes", [((5, 2, 5), (5, 2, 6)), ((5, 2, 4), (5, 2, 5)), ((5, 2, 4), (6, 2, 6))])
def test_multihead_attention_with_widths_of_its_own(shapes):
    layer = nn.MultiheadAttention(16, 2, kdim=4, vdim=6)
    arguments = X, *(torch.randn(shape) for shape in shapes)
    theirs = error_of(layer, arguments, {})
    error = error_of(tfkern.nn.MultiheadAttention.from_torch(layer), arguments, dict(need_weights=False))
    assert type(error) is type(theirs) is AssertionError
    assert str(error).startswith(str(theirs))
