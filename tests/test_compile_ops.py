"""torch.compile without graph breaks: the same bits, strides and gradients as eager, and nothing compiled anew for new lengths.

The backend aot_eager runs what was traced, fakes and all, without a compiler."""

import copy
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.bias import causal_lower_right

import tfkern
from tfkern.integrations.flash_attn import flash_attn_func
from tfkern.kernels import score_mods
from tfkern.nn import SelfAttention
from tfkern.testing.cases import CASES, FEATURE_CASES
from tfkern.testing.inputs import make_inputs


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def compiled(f, **options):
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


def results(f, tensors: dict, gradients=None) -> list:
    """What f returns, and the gradients of all tensors that can have one, with the same random bits every time."""
    torch.manual_seed(0)
    tensors = {n: x.detach().requires_grad_() if x.is_floating_point() else x for n, x in tensors.items()}
    out = f(**tensors)
    out = out if isinstance(out, tuple) else (out,)
    able = [x for x in tensors.values() if x.requires_grad]
    return [*out, *torch.autograd.grad(out, able, gradients or [torch.ones_like(x) for x in out])]


def same(found: list, wanted: list) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype
        assert x.stride() == y.stride()
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# Each feature, and the layouts, once.
TRACED = {
    "full", "causal-wide", "lower-right-tall", "window", "padded-lower-right", "gqa-everything", "layout-bnhd", "layout-strided",
    "layout-expanded", "empty-batch", "empty-keys", "bool-mask-padding", "bias-2d", "bias-of-heads", "bias-of-keys", "dropout-bias",
    "packed-self-causal", "packed-gqa", "packed-bias-dropout", "packed-slopes", "packed-sinks", "packed-none", "softcap", "slopes",
    "slopes-of-batches", "sinks-dead-rows", "score-mod-places", "scale-as-tensor", "everything", "everything-packed",
    "precise-delta", "precise-delta-packed",
}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES + FEATURE_CASES if c.name in TRACED], ids=str)
def test_each_feature(case, device):
    """Forward and every gradient, through lse too."""
    inputs = make_inputs(case, torch.float32, device)
    function = tfkern.attention_varlen if case.lengths else tfkern.attention
    options = inputs.options
    if "score_mod" in options:
        options = options | dict(score_mod=tfkern.ScoreMod(*options["score_mod"]))

    def f(**tensors):
        return function(**tensors, **options, enable_gqa=True, return_lse=True)

    gradients = (inputs.do, inputs.dlse)
    same(results(compiled(f), inputs.tensors, gradients), results(f, inputs.tensors, gradients))


@pytest.mark.parametrize(
    "case", [c for c in CASES + FEATURE_CASES if c.name in {"gqa-everything", "packed-bias-dropout"}], ids=str
)
def test_our_kernels(case, device):
    """What is compiled launches them. (By default it is the backend eager on a CPU.)"""
    inputs = make_inputs(case, torch.float32, device)
    function = tfkern.attention_varlen if case.lengths else tfkern.attention

    def f(**tensors):
        return function(**tensors, **inputs.options, enable_gqa=True, return_lse=True, backend="portable")

    gradients = (inputs.do, inputs.dlse)
    same(results(compiled(f), inputs.tensors, gradients), results(f, inputs.tensors, gradients))


@pytest.mark.slow
@pytest.mark.needs("g++", shutil.which("g++") is not None)  # PyTorch's compiler wants it for the CPU
def test_pytorchs_own_compiler(device):
    """inductor instead of aot_eager: what is around attention is compiled, too."""
    torch.manual_seed(0)
    layer = SelfAttention(64, 4, is_causal=True).to(device)
    whole = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (17, 40):
        x = torch.randn(2, length, 64, device=device, requires_grad=True)
        for found, wanted in zip(*(torch.autograd.grad(f(x).square().sum(), x) for f in (whole, layer)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Dynamo as on a machine with a GPU, where functions of Triton are kernels to it.
SCORE_MOD = """
import torch, torch.utils._triton
torch.utils._triton.has_triton = lambda: True
import tfkern
from tfkern.kernels.score_mods import signed_log, signed_log_derivative
pair = signed_log, signed_log_derivative
q = torch.randn(1, 2, 16, 8, requires_grad=True)
def run(function, score_mod):
    return torch.autograd.grad(function(lambda q: tfkern.attention(q, q, q, score_mod=score_mod))(q).sum(), q)[0]
whole = lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
named = tfkern.ScoreMod(*pair)
assert torch.equal(run(whole, named), run(lambda f: f, pair))
try:
    run(whole, pair)
except torch._dynamo.exc.TorchDynamoException:
    print("a pair raises")
"""


@pytest.mark.slow
def test_score_mod_where_dynamo_takes_functions_for_kernels():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", "-c", SCORE_MOD], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "a pair raises", done.stderr


def test_score_mod_as_a_pair_without_a_gpu():
    def f(q, score_mod):
        return tfkern.attention(q, q, q, score_mod=score_mod)

    pair = score_mods.signed_log, score_mods.signed_log_derivative
    q = QKV["q"]
    if torch.__version__ < "2.12":
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            compiled(f)(q, pair)
        return
    assert torch.equal(compiled(f)(q, pair), f(q, pair))
    if torch.cuda.is_available():
        with pytest.raises(Exception, match=r"must be a tfkern.ScoreMod"):
            compiled(f)(q.cuda(), pair)


def test_score_mod_copies():
    named = tfkern.ScoreMod(score_mods.signed_log, score_mods.signed_log_derivative)
    for copied in (copy.copy(named), pickle.loads(pickle.dumps(named))):
        assert (copied, copied.name) == (named, named.name)
    with pytest.raises(TypeError, match="score_mod must be a pair"):
        tfkern.ScoreMod(score_mods.signed_log, 1)


def test_every_case_named_is_there():
    assert {c.name for c in CASES + FEATURE_CASES} >= TRACED


QKV = {name: torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(1)) for name in ("q", "k", "v")}
X = {"x": torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(1))}
CU = torch.tensor([0, 7, 20, 40])
BIAS = torch.nn.Parameter(torch.randn(20, 20))
LOWER_RIGHT = causal_lower_right(10, 20)
sdpa = tfkern.scaled_dot_product_attention


def under_autocast(q, k, v):
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        return tfkern.attention(q, k.bfloat16(), v, dropout_p=0.1)


@pytest.mark.parametrize(
    "f",
    {
        "varlen": lambda q, k, v: tfkern.attention_varlen(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), CU, CU),
        "packed": lambda q, k, v: tfkern.attention_packed(torch.stack((q, k, v), 3).transpose(1, 2).transpose(2, 3), dropout_p=0.2),
        "packed-varlen": lambda q, k, v: tfkern.attention_packed(
            torch.stack((q, k, v), 3).permute(0, 2, 3, 1, 4).flatten(0, 1), cu_seqlens=CU, is_causal=True
        ),
        "sdpa": lambda q, k, v: sdpa(q, k, v, dropout_p=0.2, is_causal=True),
        "sdpa-mask": lambda q, k, v: sdpa(q, k, v, BIAS, scale=0.2),
        "sdpa-3d": lambda q, k, v: sdpa(q[0], k, v),
        "sdpa-5d": lambda q, k, v: sdpa(q[None], k[None], v[None, :, :1], enable_gqa=True),
        "sdpa-causal-bias": lambda q, k, v: sdpa(q[:, :, :10], k, v, LOWER_RIGHT),
        "flash-attn": lambda q, k, v: flash_attn_func(q, k, v, causal=True),
        "autocast": under_autocast,
    }.items(),
    ids=lambda f: f[0],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["train", pytest.param("no_grad", marks=pytest.mark.slow), "inference"])
def test_each_function(f, mode):
    f, c = f[1], compiled(f[1])
    if mode == "train":
        same(results(c, QKV), results(f, QKV))
        return
    with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
        torch.manual_seed(0)
        wanted = f(**QKV)
        torch.manual_seed(0)
        same([c(**QKV)], [wanted])


def test_scale_as_a_tensor():
    """Eager makes a number of it, a graph can't."""

    def f(q, k, v):
        return sdpa(q, k, v, scale=torch.tensor(0.2))

    for x, y in zip(results(compiled(f), QKV), results(f, QKV), strict=True):
        torch.testing.assert_close(x, y)


def test_patched_process():
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)

    with tfkern.patched():
        same(results(compiled(f), QKV), results(f, QKV))


def layers():
    import tfkern.nn as tn

    mha = tn.MultiheadAttention(24, 3, dropout=0.1, batch_first=True)
    padding = torch.arange(10) >= torch.tensor([[10], [6]])
    attend = tn.SelfAttention(24, 3, is_causal=True, dropout=0.1)
    encoder = tn.TransformerEncoderLayer(24, 2, 48, dropout=0.0)
    yield "self", attend, lambda x: attend(x, torch.tensor([10, 6]))
    yield "mha", mha, lambda x: mha(x, x, x, need_weights=False)[0]
    yield "mha-cross-padding", mha, lambda x: mha(x[:, :4], x, x, padding, need_weights=False)[0]
    yield "mha-unbatched", mha, lambda x: mha(x[0], x[0], x[0], need_weights=False)[0]
    yield "encoder", encoder, lambda x: encoder(src=x)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("training", [True, False])
def test_each_layer(index, training):
    torch.manual_seed(0)
    _, layer, f = list(layers())[index]
    layer.train(training)
    same(results(compiled(f), X), results(f, X))


def lengths_of(f, tensors_of, sizes) -> int:
    """How many graphs f compiles for inputs of all sizes, each with the results of eager."""
    counter = CompileCounterWithBackend("aot_eager")
    c = torch.compile(f, fullgraph=True, backend=counter)
    for size in sizes:
        tensors = tensors_of(*size)
        same(results(c, tensors), results(f, tensors))
    return counter.frame_count


def test_new_lengths_compile_nothing():
    """One graph for the first length, one for all lengths, as PyTorch has it."""
    sizes = [(20,), (33,), (64,), (9,), (128,), (77,)]

    def f(q, bias):
        return tfkern.attention(q, q, q, bias, dropout_p=0.1, is_causal=True, window=(7, None))

    assert lengths_of(f, lambda n: dict(q=torch.randn(2, 3, n, 16), bias=torch.randn(3, n, n)), sizes) == 2
    torch._dynamo.reset()
    layer = tfkern.nn.SelfAttention(24, 3, is_causal=True)
    assert lengths_of(layer, lambda n: dict(x=torch.randn(2, n, 24)), sizes) == 2
    torch._dynamo.reset()
    f = lambda q: sdpa(q, q, q, is_causal=True)  # noqa: E731
    assert lengths_of(f, lambda n: dict(q=torch.randn(2, 3, n, 16)), sizes) == 2


def test_new_sequences_compile_nothing():
    """Packed: as many sequences, and as many rows, as one likes."""

    def f(q, cu):
        return tfkern.attention_varlen(q, q, q, cu, cu, is_causal=True)

    def tensors_of(total, count):
        return dict(q=torch.randn(total, 2, 8), cu=torch.linspace(0, total, count + 1).long())

    assert lengths_of(f, tensors_of, [(20, 3), (33, 5), (64, 2), (100, 9)]) == 2


@pytest.mark.parametrize("query_varies", [True, False])
def test_a_length_that_varies_beside_one_that_does_not(query_varies):
    """Sizes are compared as numbers, also where Dynamo has a symbol for one and a number for the other."""
    fs = dict(
        attn_mask=lambda q, x: tfkern.attention(q, q, q, x), alibi_slopes=lambda q, x: tfkern.attention(q, q, q, alibi_slopes=x),
        sinks=lambda q, x: tfkern.attention(q, q, q, sinks=x),
        key_lengths=lambda q, x: tfkern.attention(q, q, q, key_lengths=x),
    )  # fmt: skip
    others = dict(attn_mask=torch.zeros(3, 4, 11, 11), alibi_slopes=torch.ones(3, 4), sinks=torch.ones(4),
                  key_lengths=torch.tensor([3, 0, 11]))  # fmt: skip
    for name, f in fs.items():
        torch._dynamo.reset()
        q, other = torch.randn(3, 4, 11, 8), others[name].clone()
        numbers, symbols = (other, q) if query_varies else (q, other)
        torch._dynamo.mark_static(numbers)
        for dim in range(symbols.dim() - (symbols is q)):
            torch._dynamo.maybe_mark_dynamic(symbols, dim)
        assert torch.equal(compiled(f)(q, other), f(q, other))


def test_dropout_draws_anew_each_call():
    c = compiled(lambda q, k, v: tfkern.attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(0)
    first, second = c(**QKV), c(**QKV)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(c(**QKV), first)


@pytest.mark.slow
def test_errors_name_the_argument():
    """What traced code raises is Dynamo's error with fullgraph, and without it ours; what values say, ours."""
    wrong = lambda q, k, v: tfkern.attention(q, k[..., :3], v)  # noqa: E731
    with pytest.raises(torch._dynamo.exc.Unsupported, match="key must have the head dim of query, 16"):
        compiled(wrong)(**QKV)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="key must have the head dim of query, 16"):
        torch.compile(wrong, backend="aot_eager")(**QKV)
    for options, message in (
        (dict(dropout_p=2.0), "dropout_p must be"), (dict(softcap=-1.0), "softcap must be"), (dict(backend="nix"), "backend must be"),
        (dict(key_lengths=torch.tensor([100, 2])), "key_lengths must lie in 0..20"),
    ):  # fmt: skip
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=message):
            compiled(lambda q, k, v, options=options: tfkern.attention(q, k, v, **options))(**QKV)
    with pytest.raises(TypeError, match="is_causal must be True or False"):
        torch.compile(lambda q, k, v: tfkern.attention(q, k, v, is_causal=1), backend="aot_eager")(**QKV)
