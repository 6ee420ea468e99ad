"""Every error message names the argument, what was wanted and what came."""

import math
import types

import numpy
import pytest
import torch

import tfkern
from tfkern import call

B, H, N, D = 2, 4, 8, 16


def good(**changes):
    arguments = dict(query=torch.randn(B, H, N, D), key=torch.randn(B, H, N, D), value=torch.randn(B, H, N, D))
    return {**arguments, **changes}


def jit(function):
    """What triton.jit makes of a function, as far as checks see."""
    return types.SimpleNamespace(fn=function)


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
    "scale text": (dict(scale="1"), TypeError, "scale must be a number, a tensor of one, or None .* but is '1'"),
    "scale nan": (dict(scale=float("nan")), ValueError, "scale must be finite, at most .* but is nan"),
    "scale of two": (dict(scale=torch.ones(2)), ValueError, r"scale must be a tensor of one floating-point number, but is torch.float32 \(2,\)"),
    "scale of integers": (dict(scale=torch.tensor(1)), ValueError, "scale must be a tensor of one floating-point number, but is torch.int64"),
    "scale with grad": (dict(scale=torch.tensor(1.0, requires_grad=True)), ValueError, "scale must not require grad"),
    "scale tensor infinite": (dict(scale=torch.tensor(float("inf"))), ValueError, "scale must be finite, but is inf"),
    "softcap zero": (dict(softcap=0.0), ValueError, "softcap must be a number above 0 and at most 3.4e.38, or None for no cap, but is 0.0"),
    "softcap beyond float32": (dict(softcap=10**400), ValueError, "softcap must be a number above 0 and at most"),
    "scale beyond float32": (dict(scale=-(10**400)), ValueError, "scale must be finite, at most 3.4e.38"),
    "softcap text": (dict(softcap="30"), TypeError, "softcap must be a number above 0, or None, but is '30'"),
    "slopes list": (dict(alibi_slopes=[1.0]), TypeError, "alibi_slopes must be a torch.Tensor, but is list"),
    "slopes shape": (dict(alibi_slopes=zeros(B)), ValueError, r"alibi_slopes must have shape \(4,\) or \(2, 4\), but has \(2,\)"),
    "slopes dtype": (dict(alibi_slopes=zeros(H).double()), TypeError, "alibi_slopes must be torch.float32 or the dtype of query, torch.float32, but is torch.float64"),
    "slopes device": (dict(alibi_slopes=zeros(H, device="meta")), ValueError, "alibi_slopes must be on the device of query, cpu, but is on meta"),
    "sinks shape": (dict(sinks=zeros(B, H)), ValueError, r"sinks must have shape \(4,\), but has \(2, 4\)"),
    "score_mod single": (dict(score_mod=len), TypeError, r"score_mod must be a pair \(value, derivative\) of @triton.jit functions"),
    "score_mod python": (dict(score_mod=(len, len)), TypeError, "score_mod must be a pair"),
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
    "dropout text": (dict(dropout_p="0.1"), ValueError, r"dropout_p must be a number in \[0, 1\], but is '0.1'"),
    "mask list": (dict(attn_mask=[[1.0]]), TypeError, "attn_mask must be a torch.Tensor, but is list"),
    "mask integers": (dict(attn_mask=torch.ones(N, N, dtype=torch.int64)), TypeError, r"attn_mask must be bool \(True = attend\), torch.float32 or the dtype of query, torch.float32, but is torch.int64"),
    "mask other float": (dict(attn_mask=torch.ones(N, N).half()), TypeError, "attn_mask must be bool .* but is torch.float16; convert it"),
    "mask shape": (dict(attn_mask=torch.ones(N, 5)), ValueError, r"attn_mask must broadcast to \(2, 4, 8, 8\) = \(B, H, Nq, Nk\), but has shape \(8, 5\)"),
    "mask larger": (dict(attn_mask=torch.ones(3, 1, N, N)), ValueError, r"attn_mask must broadcast to .* but has shape \(3, 1, 8, 8\)"),
    "mask dims": (dict(attn_mask=torch.ones(1, B, H, N, N)), ValueError, "attn_mask must broadcast to"),
    "mask device": (dict(attn_mask=torch.ones(N, N, device="meta")), ValueError, "attn_mask must be on the device of query, cpu, but is on meta"),
    "score_mod signature": (dict(score_mod=(jit(lambda s: s),) * 2), TypeError, r"score_mod must be a pair .* functions of \(score, b, h, i, j\)"),
    "backend": (dict(backend="magic"), ValueError, r"backend must be None or one of \['hopper', 'portable', 'cpu', 'eager'\], but is 'magic'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    changes, error, message = CASES[case]
    with pytest.raises(error, match=message):
        tfkern.attention(**good(**changes))


def packed(**changes):
    q = torch.randn(10, H, D)
    cu = torch.tensor([0, 4, 4, 10])
    return {**dict(query=q, key=q, value=q, cu_seqlens_q=cu, cu_seqlens_k=cu), **changes}


VARLEN_CASES = {
    "four dims": (dict(query=zeros(1, 10, H, D)), ValueError, r"query must have 3 dimensions \(total, heads, head_dim\), but has shape \(1, 10, 4, 16\)"),
    "value": (dict(value=zeros(9, H, D)), ValueError, r"value must have the length and the heads of key, \(10, 4\), but has shape \(9, 4, 16\)"),
    "list": (dict(cu_seqlens_q=[0, 10]), TypeError, "cu_seqlens_q must be a tensor of integers, but is list"),
    "float": (dict(cu_seqlens_k=torch.tensor([0.0, 4.0, 4.0, 10.0])), TypeError, "cu_seqlens_k must be int32 or int64, but is torch.float32"),
    "empty": (dict(cu_seqlens_q=torch.tensor([], dtype=torch.int32)), ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\), starting with 0, but has \(0,\)"),
    "counts": (dict(cu_seqlens_k=torch.tensor([0, 10])), ValueError, r"cu_seqlens_k must have shape \(4,\), as cu_seqlens_q has, but has \(2,\)"),
    "start": (dict(cu_seqlens_q=torch.tensor([1, 4, 4, 10])), ValueError, r"cu_seqlens_q must rise from 0 to at most 10, .* but is \[1, 4, 4, 10\]"),
    "falls": (dict(cu_seqlens_q=torch.tensor([0, 4, 3, 10])), ValueError, "cu_seqlens_q must rise"),
    "beyond": (dict(cu_seqlens_k=torch.tensor([0, 4, 4, 11])), ValueError, "cu_seqlens_k must rise from 0 to at most 10"),
    "mask too small": (dict(attn_mask=torch.zeros(5, 6)), ValueError, r"attn_mask must broadcast to \(3, 4\) and at least the longest sequence of queries and of keys, \(6, 6\), but has shape \(5, 6\)"),
    "slopes": (dict(alibi_slopes=zeros(2, H)), ValueError, r"alibi_slopes must have shape \(4,\) or \(3, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", VARLEN_CASES)
def test_varlen_message(case):
    changes, error, message = VARLEN_CASES[case]
    with pytest.raises(error, match=message):
        tfkern.attention_varlen(**packed(**changes))


PACKED_CASES = {
    "list": (dict(qkv=[1.0]), TypeError, "qkv must be a torch.Tensor, but is list"),
    "integers": (dict(qkv=zeros(B, N, 3, H, D).long()), TypeError, "qkv must be one of"),
    "four dims": (dict(qkv=zeros(B, N, H, D)), ValueError, r"qkv must have shape \(B, N, 3, H, D\), but has \(2, 8, 4, 16\)"),
    "not three": (dict(qkv=zeros(B, N, 2, H, D)), ValueError, r"qkv must have shape \(B, N, 3, H, D\)"),
    "varlen": (dict(qkv=zeros(B, N, 3, H, D), cu_seqlens=torch.tensor([0, 2])), ValueError, r"qkv must have shape \(total, 3, H, D\)"),
    "both": (dict(qkv=zeros(N, 3, H, D), cu_seqlens=torch.tensor([0, 2]), key_lengths=torch.tensor([1])), ValueError, "key_lengths can't be given with cu_seqlens"),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED_CASES)
def test_packed_message(case):
    changes, error, message = PACKED_CASES[case]
    with pytest.raises(error, match=message):
        tfkern.attention_packed(**changes)


def test_messages_are_the_same_under_autocast():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"query must be a torch\.Tensor, but is list"),
    ):
        tfkern.attention(**good(query=[1.0]))


EQUAL = {
    "window": ((1, 2), [(True, 2), (1.0, 2), (1, 2.0), (numpy.True_, 2), (numpy.float32(1), 2)]),
    "scale": (1, [True, numpy.True_]),
    "softcap": (1, [True]),
    "dropout_p": (1, [True]),
    "is_causal": (True, [1, 1.0, numpy.True_]),
    "enable_gqa": (False, [0, 0.0, numpy.False_]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_what_was_called_before_lets_nothing_pass(name):
    """Values that are equal to what is welcome, after a call that keeps that."""
    welcome, others = EQUAL[name]
    for other in others:
        for _ in range(2):
            tfkern.attention(**good(**{name: welcome}))
            with pytest.raises((TypeError, ValueError), match=name):
                tfkern.attention(**good(**{name: other}))


def test_what_was_called_before_changes_nothing():
    """0.0 and -0.0 are equal, too."""
    q = good()["query"]
    for scale in (0.0, -0.0, 0.0, numpy.float64(-0.0), 0):
        problem, _ = call.build(q, q, q, scale=scale)
        assert math.copysign(1, problem.scale) == math.copysign(1, scale)
    for window in ((1, 2), (numpy.int64(1), 2), (1, numpy.int32(2))):
        problem, _ = call.build(q, q, q, window=window)
        assert [type(side) for side in (problem.left, problem.right)] == [int, int]


def test_good_arguments_pass():
    assert tfkern.attention(**good()).shape == (B, H, N, D)


def test_a_named_backend_does_not_fall_back():
    q = torch.zeros(1, 1, 4, 300)
    assert tfkern.attention(q, q, q).shape == q.shape
    with pytest.raises(tfkern.UnsupportedError, match=r"portable: head dim 300 is outside 0..256"):
        tfkern.attention(q, q, q, backend="portable")
    with pytest.raises(tfkern.UnsupportedError, match="portable: float64 has no fused kernel"):
        tfkern.attention(*(torch.zeros(1, 1, 4, 8, dtype=torch.float64),) * 3, backend="portable")
