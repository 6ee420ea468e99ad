"""patch, unpatch and patched: who is served, what comes back, and what the report says."""

import copy
import pickle
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

import tfkern
from tfkern.integrations import adapters, served, torch_sdpa

CALLS = []


def pytorchs():
    """PyTorch's function. This module, too, would be served where it kept that by a name."""
    return torch._C._nn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Count tfkern's calls, and end with PyTorch's function where it was."""
    CALLS.clear()
    real = torch_sdpa.scaled_dot_product_attention
    monkeypatch.setattr(torch_sdpa, "scaled_dot_product_attention", lambda *a, **k: (CALLS.append(1), real(*a, **k))[1])
    yield
    tfkern.unpatch()
    assert F.scaled_dot_product_attention is pytorchs()
    assert not served._service.blocks


@pytest.fixture
def importer():
    """A module that imported the function by name."""
    module = types.ModuleType("some_model")
    module.attend = pytorchs()
    sys.modules["some_model"] = module
    yield module
    del sys.modules["some_model"]


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def call(function=None):
    """How many of tfkern's calls one call makes."""
    before = len(CALLS)
    q = x(2, 3, 5, 8)
    out = (function or F.scaled_dot_product_attention)(q, q, q, is_causal=True)
    torch.testing.assert_close(out, pytorchs()(q, q, q, is_causal=True))
    return len(CALLS) - before


def test_the_process(importer):
    assert call() == 0
    report = tfkern.patch()
    assert {"torch.nn.functional.scaled_dot_product_attention", "some_model.attend"} <= set(report.changed)
    assert call() == call(importer.attend) == 1
    assert "some_model.attend: torch -> tfkern" in str(report)
    assert tfkern.patch().changed == report.changed  # idempotent
    report = tfkern.unpatch()
    assert {"torch.nn.functional.scaled_dot_product_attention", "some_model.attend"} <= set(report.changed)
    assert F.scaled_dot_product_attention is importer.attend is pytorchs()
    assert call() == call(importer.attend) == 0
    assert str(tfkern.unpatch()) == "nothing changed"


def test_a_module_imported_later(importer):
    importer.attend = None
    tfkern.patch()
    importer.attend = pytorchs()
    assert "some_model.attend" in tfkern.patch().changed
    importer.kept = F.scaled_dot_product_attention  # imported while ours stood there
    assert call(importer.kept) == 1
    tfkern.unpatch()
    assert call(importer.kept) == 0


def test_blocks():
    with tfkern.patched() as report:
        assert "torch.nn.functional.scaled_dot_product_attention" in report.changed
        with tfkern.patched():
            assert call() == 1
        assert call() == 1
        tfkern.unpatch()  # the block wants it still
        assert call() == 1
    assert call() == 0
    tfkern.patch()
    with tfkern.patched():
        pass
    assert call() == 1
    tfkern.unpatch()
    with pytest.raises(ZeroDivisionError), tfkern.patched():
        raise ZeroDivisionError
    assert call() == 0

    @tfkern.patched()
    def decorated():
        return call()

    assert [decorated(), decorated(), call()] == [1, 1, 0]


def test_threads():
    """Blocks that overlap in any order: served while one is open, PyTorch's after the last."""
    start, errors = threading.Barrier(8), []

    def work():
        try:
            start.wait()
            for _ in range(20):
                with tfkern.patched():
                    assert F.scaled_dot_product_attention is served.dispatcher
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert F.scaled_dot_product_attention is pytorchs()


def test_another_patch_in_between():
    """Who wraps ours keeps their wrapper, and nobody runs in circles."""
    tfkern.patch()
    ours = F.scaled_dot_product_attention

    def wrapper(*args, **kwargs):
        return ours(*args, **kwargs)

    F.scaled_dot_product_attention = wrapper
    try:
        assert call() == 1
        tfkern.unpatch()
        assert F.scaled_dot_product_attention is wrapper
        assert call() == 0
        with tfkern.patched():
            assert call() == 1
        assert F.scaled_dot_product_attention is wrapper
        assert call() == 0
    finally:
        F.scaled_dot_product_attention = pytorchs()


def test_what_is_served():
    """PyTorch's own layers, a causal bias, gradients, checkpointing with dropout."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    y = x(2, 5, 8)
    want = layer(y, y, y, need_weights=False)[0]
    q = x(2, 3, 5, 8)
    bias = causal_lower_right(3, 5)
    biased = F.scaled_dot_product_attention(q[:, :, :3], q, q, bias)
    with tfkern.patched():
        torch.testing.assert_close(layer(y, y, y, need_weights=False)[0], want)
        torch.testing.assert_close(F.scaled_dot_product_attention(q[:, :, :3], q, q, bias), biased)
        assert len(CALLS) == 2
        grads = []
        for attend in (
            F.scaled_dot_product_attention,
            lambda *a: checkpoint(F.scaled_dot_product_attention, *a, use_reentrant=False),
        ):
            torch.manual_seed(3)
            leaf = q.clone().requires_grad_()
            grads += torch.autograd.grad(attend(leaf, leaf, leaf, None, 0.5).square().sum(), leaf)
        assert torch.equal(*grads)


def test_compiled_code_follows():
    """What was compiled before, within and after."""
    q = x(2, 3, 5, 8)

    @torch.compile(backend="eager")
    def attend(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True) * 2.0

    found = [attend(q)]
    with tfkern.patched():
        found.append(attend(q))
        assert len(CALLS) == 1
    found.append(attend(q))
    assert len(CALLS) == 1
    for y in found:
        torch.testing.assert_close(y, 2.0 * pytorchs()(q, q, q, is_causal=True))


class Own(nn.MultiheadAttention):
    """Someone's subclass."""


class CausalSelfAttention(nn.Module):
    """Someone's attention."""


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    shared = nn.MultiheadAttention(8, 2)
    more = dict(shared=shared, again=shared, own=Own(8, 2), other=CausalSelfAttention(), plain=nn.Linear(8, 8))
    return nn.ModuleDict(dict(encoder=encoder, **more, ours=tfkern.nn.MultiheadAttention(8, 2)))


CHANGED = {
    "encoder",
    *(f"encoder.layers.{i}{part}" for i in (0, 1) for part in ("", ".self_attn")),
    "shared",
}


def test_a_model():
    m = model()
    before = pickle.dumps({n: vars(x) for n, x in m.named_modules()})
    classes = [type(x) for x in m.modules()]
    state = {n: x.data_ptr() for n, x in m.state_dict().items()}
    report = tfkern.patch(m)
    assert set(report.changed) == CHANGED
    assert report.changed["shared"] == "torch.nn.MultiheadAttention -> tfkern.nn.MultiheadAttention"
    assert type(m.shared) is type(m.again) is tfkern.nn.MultiheadAttention
    assert set(report.unchanged) == {"own", "other"}
    assert "is a subclass of torch.nn.MultiheadAttention" in report.unchanged["own"]
    assert "no adapter knows" in report.unchanged["other"]
    assert "not changed (2):" in str(report)
    again = tfkern.patch(m)
    assert (again.changed, set(again.already), again.unchanged) == ({}, CHANGED, report.unchanged)
    assert {n: x.data_ptr() for n, x in m.state_dict().items()} == state
    assert set(tfkern.unpatch(m).changed) == CHANGED
    assert [type(x) for x in m.modules()] == classes
    assert pickle.dumps({n: vars(x) for n, x in m.named_modules()}) == before
    assert not tfkern.unpatch(m).changed
    assert type(m.ours) is tfkern.nn.MultiheadAttention


def test_a_module_alone():
    layer = nn.MultiheadAttention(8, 2)
    report = tfkern.patch(layer)
    assert type(layer) is tfkern.nn.MultiheadAttention
    assert "(the model): torch.nn.MultiheadAttention -> tfkern.nn.MultiheadAttention" in str(report)
    tfkern.unpatch(layer)
    assert type(layer) is nn.MultiheadAttention
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, or None for the process, but is list"):
        tfkern.patch([layer])


def test_a_block_for_a_model():
    m = model()
    tfkern.patch(m.shared)
    with tfkern.patched(m) as report:
        assert set(report.changed) == CHANGED - {"shared"}
        assert set(report.already) == {"shared"}
    assert type(m.encoder) is nn.TransformerEncoder
    assert type(m.shared) is tfkern.nn.MultiheadAttention
    with pytest.raises(ZeroDivisionError), tfkern.patched(m):
        raise ZeroDivisionError
    assert type(m.encoder) is nn.TransformerEncoder


def test_an_adapter_of_another_library(monkeypatch):
    """What such a file does: register a class, and why some instances stay."""
    monkeypatch.setattr(adapters, "_adapters", dict(adapters._adapters))

    class Fused(CausalSelfAttention):
        pass

    adapter = adapters.by_class(CausalSelfAttention, Fused, lambda module: "it says so" if hasattr(module, "stays") else None)
    assert adapters.register(adapter) is adapter
    m = model()
    assert tfkern.patch(m).changed["other"].endswith("CausalSelfAttention -> " + adapter.becomes)
    assert type(m.other) is Fused
    tfkern.unpatch(m)
    assert type(m.other) is CausalSelfAttention
    m.other.stays = True
    assert tfkern.patch(m).unchanged["other"] == "it says so"


@pytest.mark.parametrize("after", [False, True])
def test_a_failure_half_way(after, monkeypatch):
    m = model()
    before = pickle.dumps(m)
    good = adapters.named("torch.nn.MultiheadAttention")

    def apply(module):
        if module is m.shared:
            if after:
                good.apply(module)
            raise ZeroDivisionError
        good.apply(module)

    monkeypatch.setitem(adapters._adapters, good.name, adapters.Adapter(**{**vars(good), "apply": apply}))
    with pytest.raises(ZeroDivisionError):
        tfkern.patch(m)
    assert pickle.dumps(m) == before


def test_copies_and_pickles():
    m = tfkern.patch(m := model()) and m
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert type(other.shared) is tfkern.nn.MultiheadAttention
        assert set(tfkern.unpatch(other).changed) == CHANGED
        assert [type(x) for x in other.modules()] == [type(x) for x in model().modules()]
        assert [set(vars(x)) for x in other.modules()] == [set(vars(x)) for x in model().modules()]


def test_layers_that_must_keep_their_way():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.self_attn = Own(8, 2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1)
    report = tfkern.patch(encoder)
    assert not report.changed
    assert "its self_attn is a" in report.unchanged["layers.0"]
    encoder.layers[0] = CausalSelfAttention()
    assert "it has a" in tfkern.patch(encoder).unchanged[""]


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_encoder(training, padded, causal, monkeypatch):
    """Same results, every attention by tfkern, in inference too."""
    m = model().encoder.train(training)
    y = x(2, 5, 8)
    options = dict(is_causal=True, mask=nn.Transformer.generate_square_subsequent_mask(5)) if causal else {}
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    if padded:
        options["src_key_padding_mask"] = torch.zeros(2, 5).masked_fill(pad, -torch.inf) if causal else pad
    import tfkern.nn.multihead as module

    count = []
    for name in ("attention", "attention_packed"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: (count.append(1), real(*a, **k))[1])
    with torch.set_grad_enabled(training):
        want = m(y, **options)
        assert not count
        with tfkern.patched(m):
            found = m(y, **options)
    assert len(count) == 2
    seen = ~pad if padded else slice(None)  # PyTorch's fused inference leaves 0 in padding
    torch.testing.assert_close(found[seen], want[seen])


def test_transformer():
    """Encoder and decoder, a causal target, padding: outputs and the gradient of every parameter."""
    torch.manual_seed(0)
    m = nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True)
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options = dict(
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.bool), tgt_is_causal=True,
        src_key_padding_mask=pad, memory_key_padding_mask=pad,
    )  # fmt: skip

    def run():
        out = m(x(2, 5, 8), x(2, 4, 8), **options)
        return [out, *torch.autograd.grad(out.square().sum() + out[0, 0, 0], list(m.parameters()))]

    want = run()
    with tfkern.patched(m) as report:
        assert len(report.changed) == 7
        found = run()
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_encoder_layer_of_nested_tensors():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    nested = torch.nested.nested_tensor([x(n, 8) for n in (3, 5)])
    with torch.no_grad():
        want = layer(nested)
        with tfkern.patched(layer):
            found = layer(nested)
    for a, b in zip(found.unbind(), want.unbind(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_step_is_the_same():
    """With hooks and an optimizer that were there before. In float64: the steps make errors of float32 grow, by as much as the
    order of its sums says."""
    losses = []
    for patch in (False, True):
        m = model().encoder.double()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        seen = []
        m.layers[0].self_attn.register_forward_hook(lambda *a, seen=seen: seen.append(1))
        if patch:
            tfkern.patch(m)
        for _ in range(3):
            optimizer.zero_grad()
            loss = m(x(2, 5, 8).double()).square().sum() + m(x(2, 5, 8).double())[0, 0, 0]
            loss.backward()
            optimizer.step()
        assert len(seen) == 6
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
