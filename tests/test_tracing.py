"""What records PyTorch's operators finds PyTorch's where tfkern is patched in; tfkern's own functions say what to do."""

import copy
import importlib.util
import io
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import tfkern
from tfkern import attention, reference
from tfkern.integrations import nanogpt, served, timm

torch.fx.wrap("attention")
ONNX = pytest.mark.needs("onnx and onnxscript", all(importlib.util.find_spec(x) for x in ("onnx", "onnxscript")))
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Called(nn.Module):
    """A model that calls a function of attention."""

    def __init__(self, function=None):
        super().__init__()
        self.function = function

    def forward(self, x):
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        function = self.function or F.scaled_dot_product_attention
        return function(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def encoder():
    return nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1))


MODELS = {  # each is tfkern's after patch() and patch(model)
    "a function": Called,
    "MultiheadAttention": Asking,
    "TransformerEncoder": encoder,
    "nanoGPT": lambda: nn.Sequential(nanogpt.CausalSelfAttention(SimpleNamespace(n_embd=8, n_head=2))),
    "timm": lambda: nn.Sequential(timm.Attention(8, 2)),
    "timm, normalised": lambda: nn.Sequential(timm.Attention(8, 2, qk_norm=True, norm_layer=nn.LayerNorm)),
    "timm, written out": lambda: nn.Sequential(unfused(timm.Attention(8, 2))),
}


def unfused(layer):
    layer.fused_attn = False
    return layer


def model(name: str, training: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train(training).requires_grad_(training)


@pytest.fixture
def patched():
    with tfkern.patched():
        yield


def recorded(way: str, m: nn.Module, x: torch.Tensor):
    """m as it was recorded, callable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        if way == "fx":
            return torch.fx.symbolic_trace(m)
        if way == "jit":
            return torch.jit.trace(m, (x,))
        return make_fx(m, tracing_mode=way, _allow_non_fake_inputs=True)(x)


WAYS = ["fx", "jit", "real", "symbolic", "jit, inference", "fake, inference"]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[pytest.mark.slow] if way == "symbolic" and name not in ("a function", "nanoGPT") else [])
        for name in MODELS
        for way in WAYS
    ],
)
def test_patched_models_are_recorded(patched, name, way):
    way, _, inference = way.partition(", ")
    m = model(name, not inference)
    want = m(X)
    tfkern.patch(m)
    program = recorded(way, m, X)
    torch.testing.assert_close(program(X), want)
    if way != "jit":
        assert not [node for node in program.graph.nodes if "tfkern" in str(node.target)]
    if way == "symbolic":
        longer = torch.randn(3, 9, 8)
        torch.testing.assert_close(program(longer), m(longer))


def test_a_layer_of_pytorchs_is_one_node(patched):
    """As in PyTorch: what is patched stays patched in the recorded model."""
    for name, path in (("MultiheadAttention", "attn"), ("TransformerEncoder", "0")):
        nodes = torch.fx.symbolic_trace(model(name)).graph.nodes
        m = model(name)
        tfkern.patch(m)
        program = torch.fx.symbolic_trace(m)
        assert [(n.op, n.target) for n in program.graph.nodes] == [(n.op, n.target) for n in nodes]
        assert type(program.get_submodule(path)).__module__.startswith("tfkern.nn")


def test_what_the_operator_is_given(patched):
    """Masks, scale, groups, dropout reach PyTorch's operator."""
    q, mask = torch.randn(1, 4, 5, 8), torch.randn(5, 5)

    def f(q, mask):
        return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], mask, 0.0, False, scale=0.3, enable_gqa=True)

    want = f(q, mask)
    for program in (torch.fx.symbolic_trace(f), make_fx(f, tracing_mode="symbolic")(q, mask)):
        torch.testing.assert_close(program(q, mask), want)
    node = next(n for n in torch.fx.symbolic_trace(f).graph.nodes if n.target is torch._C._nn.scaled_dot_product_attention)
    assert (len(node.args) + len(node.kwargs), node.kwargs["scale"], node.kwargs["enable_gqa"]) == (8, 0.3, True)


def test_make_fx_of_gradients(patched):
    """PyTorch's of the patched function, an op of tfkern's of its own."""
    q = torch.randn(1, 2, 5, 8)
    for function, op in (
        (F.scaled_dot_product_attention, "scaled_dot_product"),
        (tfkern.attention, "tfkern.attention_backward"),
    ):

        def grad(q):
            return torch.autograd.grad(function(q, q, q).square().sum(), q)[0]  # noqa: B023  # called within the loop

        leaf = q.clone().requires_grad_()
        for mode in ("real", "symbolic"):
            program = make_fx(grad, tracing_mode=mode)(leaf)
            assert any(op in str(node.target) for node in program.graph.nodes)
            torch.testing.assert_close(program(q), grad(leaf))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_script(patched):
    """The function is PyTorch's to TorchScript; a layer of ours says that it can't."""
    want = Called()(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(scriptable)(X), want)
        for name in ("MultiheadAttention", "TransformerEncoder", "nanoGPT", "timm"):
            m = model(name)
            tfkern.patch(m)
            with pytest.raises(NotImplementedError, match=r"torch\.jit\.script can't compile tfkern's .*: tfkern\.unpatch"):
                torch.jit.script(m)
    assert F.scaled_dot_product_attention is served.dispatcher


def scriptable(x: torch.Tensor) -> torch.Tensor:
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


def varlen(q, k, v, is_causal):
    cu = torch.tensor([0, 5])
    return tfkern.attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu, cu, is_causal=is_causal)


def packed(q, k, v, is_causal):
    return tfkern.attention_packed(torch.stack((q, k, v), 1).permute(0, 3, 1, 2, 4), is_causal=is_causal)


@pytest.mark.parametrize("way", ["fx", "jit"])
@pytest.mark.parametrize("function", [tfkern.attention, varlen, packed], ids=["attention", "varlen", "packed"])
def test_tfkerns_own_functions_say_what_to_do(function, way):
    recorder = {"fx": "torch.fx.symbolic_trace", "jit": "torch.jit.trace"}[way]
    with pytest.raises(NotImplementedError, match=rf"can't be recorded by {recorder}\. Call tfkern\.scaled_dot_product_att"):
        recorded(way, Called(function), X)


def calls_wrapped(q):
    return attention(q, q, q, is_causal=True)


def test_what_they_say_works():
    """The ways that the message names."""
    q = torch.randn(1, 2, 5, 8)
    want = tfkern.attention(q, q, q, is_causal=True)
    torch.testing.assert_close(torch.fx.symbolic_trace(calls_wrapped)(q), want)
    for function in (tfkern.scaled_dot_product_attention, reference.attention):
        torch.testing.assert_close(recorded("jit", Called(function), X)(X), Called(tfkern.attention)(X))
    torch.testing.assert_close(torch.export.export(Called(tfkern.attention), (X,)).module()(X), Called(tfkern.attention)(X))


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_tfkerns_op(patched, strict):
    m = model("MultiheadAttention")
    tfkern.patch(m)
    program = torch.export.export(nn.Sequential(m, Called()), (X,), strict=strict)
    assert sum("tfkern.attention" in str(node.target) for node in program.graph.nodes) == 2


class Transformers(nn.Module):
    """A model of transformers: causal, padded, of grouped heads, or with features that PyTorch's operator hasn't."""

    def __init__(self, name: str, **more):
        super().__init__()
        import transformers

        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=11)
        config = getattr(transformers, f"{name}Config")(**sizes, **more)
        self.model = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager").eval()

    def forward(self, ids, padding):
        return self.model(input_ids=ids, attention_mask=padding, use_cache=False).last_hidden_state


@pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", dict(num_key_value_heads=1)),
        ("Gemma2", dict(num_key_value_heads=1, head_dim=8, sliding_window=3, attn_logit_softcapping=2.0)),
    ],
    ids=["Llama", "Gemma2"],
)
def test_models_of_transformers(name, more):
    torch.manual_seed(0)
    m, ids = Transformers(name, **more), torch.arange(12).view(2, 6) % 11
    paddings = [torch.tensor([[1] * 6, [1] * n + [0] * (6 - n)]) for n in (6, 4, 2)]
    want = [m(ids, padding) for padding in paddings]
    tfkern.patch(m)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(m, (ids, paddings[1]), strict=False)
        for padding, y in zip(paddings, want, strict=True):
            seen = padding.bool()
            torch.testing.assert_close(program(ids, padding)[seen], y[seen])


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_copies_of_patched_models():
    """deepcopy, pickle and torch.package: patched they stay, and are undone."""
    m = model("MultiheadAttention")
    tfkern.patch(m)
    want = m(X)
    stream = io.BytesIO()
    with torch.package.PackageExporter(stream) as exporter:
        exporter.extern(["torch.**", "tfkern.**", "collections.**", "_io", "sys"])
        exporter.save_pickle("model", "model.pkl", m.attn)
    stream.seek(0)
    taken = model("MultiheadAttention")
    taken.attn = torch.package.PackageImporter(stream).load_pickle("model", "model.pkl")
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), taken):
        assert type(other.attn) is tfkern.nn.MultiheadAttention
        assert torch.equal(other(X), want)
        assert set(tfkern.unpatch(other).changed) == {"attn"}


@ONNX
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
@pytest.mark.parametrize("name", MODELS)
def test_onnx(patched, name, dynamo, tmp_path):
    """Both exporters make a graph of operators that ONNX knows, which gives the same where something is there to run it."""
    import onnx

    m = model(name)  # not inference: what PyTorch's layers do there, the older exporter can't write
    want = m(X).detach()
    tfkern.patch(m)
    options = dict(training=torch.onnx.TrainingMode.PRESERVE) if not dynamo else {}
    torch.onnx.export(m, (X,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False, **options)
    graph = onnx.load(tmp_path / "m.onnx")
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx", "pkg.onnxscript.torch_lib.common"}
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        found = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-4, atol=1e-5)


@ONNX
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_onnx_of_tfkerns_own_function(dynamo, tmp_path):
    with pytest.raises(Exception, match=r"tfkern\.attention can't be recorded by torch\.onnx\.export"):
        torch.onnx.export(Called(tfkern.attention), (X,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
