"""Every error message names the argument, what was wanted and what came."""

import pytest
import torch

import tfkern

B, H, N, D = 2, 4, 8, 16


def good(**changes):
    arguments = dict(query=torch.randn(B, H, N, D), key=torch.randn(B, H, N, D), value=torch.randn(B, H, N, D))
    return {**arguments, **changes}


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


CASES = {
    "not a tensor": (dict(query=[1.0]), TypeError, "query must be a torch.Tensor, but is list"),
    "three dims": (dict(key=zeros(H, N, D)), ValueError, r"key must have 4 dimensions .* shape \(4, 8, 16\)"),
    "integers": (dict(query=zeros(B, H, N, D, dtype=torch.int32)), TypeError, "query must be one of .* but is torch.int32"),
    "complex": (dict(query=zeros(B, H, N, D, dtype=torch.complex64)), TypeError, "but is torch.complex64"),
    "mixed dtypes": (dict(value=zeros(B, H, N, D).half()), TypeError, "value must have the dtype of query, torch.float32, but is torch.float16"),
    "mixed devices": (dict(key=zeros(B, H, N, D, device="meta")), ValueError, "key must be on the device of query, cpu, but is on meta"),
    "batches": (dict(key=zeros(3, H, N, D)), ValueError, r"key must have the batch size of query, 2, but has shape \(3, 4, 8, 16\)"),
    "head dims": (dict(key=zeros(B, H, N, 8)), ValueError, r"key must have the head dim of query, 16, but has shape \(2, 4, 8, 8\)"),
    "value length": (dict(value=zeros(B, H, 9, D)), ValueError, r"value must have the heads and the length of key, \(4, 8\), but has shape \(2, 4, 9, 16\)"),
    "heads": (dict(key=zeros(B, 2, N, D), value=zeros(B, 2, N, D)), ValueError, "query has 4 heads, key and value have 2; .* enable_gqa=True"),
    "gqa multiple": (dict(key=zeros(B, 3, N, D), value=zeros(B, 3, N, D), enable_gqa=True), ValueError, "heads of query, 4, must be a multiple of those of key and value, 3"),
    "gqa no queries' heads": (dict(query=zeros(B, 0, N, D), enable_gqa=True), ValueError, "heads of query, 0, must be a multiple"),
    "causal text": (dict(is_causal="no"), TypeError, "is_causal must be True or False, but is 'no'"),
    "backend list": (dict(backend=["eager"]), ValueError, r"but is \['eager'\]"),
    "alignment": (dict(causal_alignment="bottom"), ValueError, r"causal_alignment must be one of \('upper_left', 'lower_right'\), but is 'bottom'"),
    "scale text": (dict(scale="1"), TypeError, "scale must be a number or None .* but is '1'"),
    "scale nan": (dict(scale=float("nan")), ValueError, "scale must be finite, but is nan"),
    "scale tensor": (dict(scale=torch.tensor(1.0)), NotImplementedError, "scale as a tensor is not built yet"),
    "window single": (dict(window=3), TypeError, "window must be a pair .* but is 3"),
    "window text": (dict(window=("a", 1)), TypeError, "window's left must be an integer or None, but is 'a'"),
    "window negative": (dict(window=(1, -1)), ValueError, "window's right must be 0 or more, but is -1; None means unbounded"),
    "window bool": (dict(window=(True, 1)), TypeError, "window's left must be an integer or None, but is True"),
    "lengths list": (dict(key_lengths=[1, 2]), TypeError, "key_lengths must be a tensor of 2 integers, but is list"),
    "lengths float": (dict(key_lengths=zeros(B)), TypeError, "key_lengths must be int32 or int64, but is torch.float32"),
    "lengths shape": (dict(key_lengths=zeros(3, dtype=torch.int64)), ValueError, r"key_lengths must have shape \(2,\), .* but has \(3,\)"),
    "lengths device": (dict(key_lengths=zeros(B, dtype=torch.int64, device="meta")), ValueError, "key_lengths must be on the device of query, cpu, but is on meta"),
    "lengths beyond": (dict(key_lengths=torch.tensor([1, 9])), ValueError, r"key_lengths must lie in 0..8, the length of key, but are \[1, 9\]"),
    "lengths negative": (dict(key_lengths=torch.tensor([-1, 2])), ValueError, "key_lengths must lie in 0..8"),
    "dropout range": (dict(dropout_p=1.5), ValueError, r"dropout_p must be a number in \[0, 1\], but is 1.5"),
    "dropout": (dict(dropout_p=0.1), NotImplementedError, "attention dropout is not built yet"),
    "mask": (dict(attn_mask=torch.ones(N, N, dtype=torch.bool)), NotImplementedError, "attn_mask is not built yet"),
    "backend": (dict(backend="magic"), ValueError, r"backend must be None or one of \['portable', 'eager'\], but is 'magic'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    changes, error, message = CASES[case]
    with pytest.raises(error, match=message):
        tfkern.attention(**good(**changes))


def test_good_arguments_pass():
    assert tfkern.attention(**good()).shape == (B, H, N, D)


def test_a_named_backend_does_not_fall_back():
    q = torch.zeros(1, 1, 4, 300)
    assert tfkern.attention(q, q, q).shape == q.shape
    with pytest.raises(tfkern.UnsupportedError, match=r"portable: head dim 300 is outside 1..256"):
        tfkern.attention(q, q, q, backend="portable")
    with pytest.raises(tfkern.UnsupportedError, match="portable: float64 has no fused kernel"):
        tfkern.attention(*(torch.zeros(1, 1, 4, 8, dtype=torch.float64),) * 3, backend="portable")
