"""Tensors without data, of the device meta or of a FakeTensorMode: shapes, dtypes and strides at once, of every public function."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tfkern
from tfkern.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from tfkern.kernels import score_mods
from tfkern.testing.cases import CASES, FEATURE_CASES
from tfkern.testing.inputs import make_inputs

MANY = 1 << 17  # rows: the scores of one call would be 64 GiB


def patched(q, k, v):
    with tfkern.patched():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def nested(q, cu):
    x = torch.nested.nested_tensor_from_jagged(q, cu).transpose(1, 2)
    return tfkern.attention(x, x, x).transpose(1, 2).values()


def calls(make, device):
    """(name, a call, its differentiable tensors)"""
    qkv = [make(1, 2, MANY, 8) for _ in range(3)]
    rows = [make(MANY, 2, 8) for _ in range(3)]
    packed, packed_rows = make(1, MANY, 3, 2, 8), make(MANY, 3, 2, 8)
    cu = torch.tensor([0, 7, MANY], device=device)
    yield "attention", lambda: tfkern.attention(*qkv, is_causal=True, return_lse=True)[0], qkv
    yield "by name", lambda: tfkern.attention(*qkv, dropout_p=0.1, backend="portable"), qkv
    score_mod = score_mods.signed_log, score_mods.signed_log_derivative
    yield "score_mod", lambda: tfkern.attention(*qkv, score_mod=score_mod), qkv
    yield "scale", lambda: tfkern.scaled_dot_product_attention(*qkv, scale=torch.tensor(0.5, device=device)), qkv
    yield "sdpa", lambda: tfkern.scaled_dot_product_attention(*(x[0] for x in qkv), dropout_p=0.1), qkv
    yield "patched", lambda: patched(*qkv), qkv
    yield "packed", lambda: tfkern.attention_packed(packed, window=(9, 0)), [packed]
    yield "varlen", lambda: tfkern.attention_varlen(*rows, cu, cu, is_causal=True), rows
    yield "packed varlen", lambda: tfkern.attention_packed(packed_rows, cu_seqlens=cu), [packed_rows]
    yield "nested", lambda: nested(rows[0], cu), rows[:1]
    yield "flash-attn", lambda: flash_attn_func(*(x.transpose(1, 2) for x in qkv), causal=True), qkv
    yield "flash-attn varlen", lambda: flash_attn_varlen_func(*rows, cu, cu, MANY, MANY), rows
    x = make(1, MANY, 16)
    layer = tfkern.nn.SelfAttention(16, 2, dropout=0.1)
    yield "self", lambda: layer(x), [x]
    mha = tfkern.nn.MultiheadAttention(16, 2, batch_first=True)
    yield "mha", lambda: mha(x, x, x, need_weights=False)[0], [x]
    encoder = tfkern.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    yield "encoder", lambda: encoder(x), [x]


def without_data(x):
    return x.is_meta or isinstance(x, FakeTensor)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_each_function(kind):
    device = "meta" if kind == "meta" else "cpu"
    with torch.device(device), FakeTensorMode(shape_env=ShapeEnv()) if kind == "fake" else torch.device(device):
        for name, call, inputs in calls(lambda *shape: torch.empty(shape, requires_grad=True), device):
            out = call()
            gradients = torch.autograd.grad(out.sum(), inputs)
            assert without_data(out), name
            for x, gradient in zip(inputs, gradients, strict=True):
                assert without_data(gradient), name
                assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype), name


SHOWN = {"causal", "layout-bnhd", "layout-expanded", "gqa-everything", "bias-of-heads", "packed-slopes", "sinks", "everything"}


@pytest.mark.parametrize("case", [c for c in CASES + FEATURE_CASES if c.name in SHOWN], ids=str)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_as_with_data(case, kind):
    """Shapes, dtypes and strides of results and gradients."""
    inputs = make_inputs(case, torch.float32, "cpu")
    function = tfkern.attention_varlen if case.lengths else tfkern.attention

    def results(tensors, options):
        able = [x for x in tensors.values() if x.requires_grad]
        out = function(**tensors, **options, enable_gqa=True, return_lse=True)
        return [*out, *torch.autograd.grad([x.sum() for x in out], able)]

    def moved(x, requires_grad=False):
        if not isinstance(x, torch.Tensor):
            return x
        x = x.detach().to("meta") if kind == "meta" else mode.from_tensor(x.detach())
        return x.requires_grad_(requires_grad)

    given = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.tensors.items()}
    wanted = results(given, inputs.options)
    mode = FakeTensorMode()
    strided = {name: moved(x, x.requires_grad) for name, x in given.items()}
    for name, x in given.items():  # .to("meta") makes dense what is not
        if strided[name].stride() != x.stride():
            strided[name] = torch.empty_strided(x.shape, x.stride(), device="meta").requires_grad_(x.requires_grad)
    options = {name: moved(x) for name, x in inputs.options.items()}
    with mode if kind == "fake" else torch.device("meta"):
        found = results(strided, options)
    for x, y in zip(found, wanted, strict=True):
        assert without_data(x)
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_errors_are_those_with_data():
    q = torch.empty(2, 3, 8, 4, device="meta")
    for options, message in (
        (dict(dropout_p=2.0), "dropout_p must be"), (dict(softcap=-1.0), "softcap must be"), (dict(backend="nix"), "backend must be"),
        (dict(window=(True, 1)), "window's left must be"), (dict(causal_alignment="left"), "causal_alignment must be"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            tfkern.attention(q, q, q, **options)
    with pytest.raises(ValueError, match="key must have the head dim"):
        tfkern.attention(q, q[..., :3], q)
