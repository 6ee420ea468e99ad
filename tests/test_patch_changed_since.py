"""What else may change a module that tfkern.patch(model) has changed, or is to change: undone is what is still ours, and the
report names the rest."""

import functools
import importlib.util
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tfkern
from tfkern.integrations import nanogpt, timm

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def layer() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True)


class Model(nn.Module):
    """Two layers, one of PyTorch's encoder's."""

    def __init__(self):
        super().__init__()
        self.attn = layer()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.encoder(self.attn(x, x, x, need_weights=False)[0])


def attending(monkeypatch) -> list:
    """The calls of tfkern's attention that its MultiheadAttention makes."""
    import tfkern.nn.multihead as module

    made = []
    for name in ("attention", "attention_packed"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: (made.append(1), real(*a, **k))[1])
    return made


def wrapped(module: nn.Module) -> nn.Module:
    """As accelerate's hooks: the forward of before is kept, and an attribute of the instance calls it."""
    module._old_forward = module.forward
    module.forward = functools.update_wrapper(
        functools.partial(lambda m, *a, **k: m._old_forward(*a, **k), module), module.forward
    )
    return module


def unwrapped(module: nn.Module) -> nn.Module:
    """As accelerate removes them."""
    module.forward = module._old_forward
    del module._old_forward
    return module


DERIVED = {
    "weight_norm": (
        lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
        lambda m: parametrize.remove_parametrizations(m, "in_proj_weight"),
    ),
    "orthogonal": (
        lambda m: parametrizations.orthogonal(m, "in_proj_weight"),
        lambda m: parametrize.remove_parametrizations(m, "in_proj_weight"),
    ),
    "a class of someone's": (
        lambda m: setattr(m, "__class__", type("Sharded", (type(m),), {})),
        lambda m: setattr(m, "__class__", type(m).__bases__[0]),
    ),
}


@pytest.mark.parametrize("way", DERIVED)
def test_a_class_that_was_derived_since(way, monkeypatch):
    """It keeps working, it is named, and is undone once that is."""
    derive, undo = DERIVED[way]
    model, made = Model(), attending(monkeypatch)
    tfkern.patch(model)
    derive(model.attn)
    want = model(X)
    assert len(made) == 2
    report = tfkern.unpatch(model)
    assert set(report.changed) == {"encoder", "encoder.self_attn"}
    assert "derived from tfkern.nn.MultiheadAttention; undo what derived it" in report.unchanged["attn"]
    torch.testing.assert_close(model(X), want)
    assert set(tfkern.patch(model).already) == {"attn"}
    undo(model.attn)
    assert set(tfkern.unpatch(model).changed) == {"attn", "encoder", "encoder.self_attn"}
    assert type(model.attn) is nn.MultiheadAttention
    made.clear()
    torch.testing.assert_close(model(X), want)
    assert not made


def test_a_class_that_was_derived_within_a_block():
    """A warning says so, after everything else is undone."""

    def run(model, attn):
        with tfkern.patched(model):
            parametrizations.weight_norm(attn, "in_proj_weight")
            return model(X)

    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            UserWarning, match=r"tfkern\.patched leaves attn: its class is .*ParametrizedMultiheadAttention by now"
        ):
            run(model, model.attn)
    assert type(model.encoder) is nn.TransformerEncoderLayer
    assert model(X).shape == X.shape
    model = nn.Sequential(Model())
    with pytest.warns(UserWarning, match=r"leaves 0\.attn: its class"):
        want = run(model, model[0].attn)
    torch.testing.assert_close(model(X), want)


@pytest.mark.needs("torch.distributed", torch.distributed.is_available())
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_fully_shard_since():
    """It derives classes, and nothing undoes that."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Model()
        want = model(X)
        tfkern.patch(model)
        fully_shard(model.attn, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        report = tfkern.unpatch(model)
        assert "FSDPMultiheadAttention by now, derived from tfkern.nn.MultiheadAttention" in report.unchanged["attn"]
        assert len(report.changed) == 2
        torch.testing.assert_close(model(X), want)
    finally:
        torch.distributed.destroy_process_group()


def test_a_class_that_is_no_longer_ours(monkeypatch):
    """Left to who changed it; a later patch does not take it for changed before."""
    made = attending(monkeypatch)
    model = Model()
    tfkern.patch(model)
    model.attn.__class__ = nn.MultiheadAttention
    assert "attn" in tfkern.patch(model).changed
    model(X)
    assert len(made) == 2

    class Other(nn.MultiheadAttention):
        pass

    model.attn.__class__ = Other
    assert "Other by now and no longer tfkern.nn.MultiheadAttention" in tfkern.unpatch(model).unchanged["attn"]
    assert type(model.attn) is Other
    assert not tfkern.unpatch(model).unchanged


@pytest.mark.parametrize("block", [False, True])
def test_a_forward_that_was_wrapped_since(block, monkeypatch):
    """Whoever kept ours by a bound method has the class's own afterwards."""
    made = attending(monkeypatch)
    model = Model()
    want = model(X)
    if block:
        with tfkern.patched(model):
            wrapped(model.attn), wrapped(model.encoder), wrapped(model.encoder.self_attn)
            torch.testing.assert_close(model(X), want)
    else:
        tfkern.patch(model)
        wrapped(model.attn), wrapped(model.encoder), wrapped(model.encoder.self_attn)
        torch.testing.assert_close(model(X), want)
        assert not tfkern.unpatch(model).unchanged
    assert len(made) == 2
    for remove in (lambda m: m, unwrapped):
        remove(model.attn)
        torch.testing.assert_close(model(X), want)
    assert len(made) == 2
    assert type(model.attn) is nn.MultiheadAttention


@pytest.mark.parametrize("removed", [False, True])
def test_a_forward_that_was_wrapped_before(removed, monkeypatch):
    """It goes past the class, so that nothing would come of a change; PyTorch's encoder layer keeps its forward, and changes."""
    made = attending(monkeypatch)
    model = Model()
    for module in (model.attn, model.encoder):
        wrapped(module)
        if removed:  # which leaves the attribute
            unwrapped(module)
    report = tfkern.patch(model)
    assert set(report.changed) == {"encoder", "encoder.self_attn"}
    assert "its forward is an attribute of the instance" in report.unchanged["attn"]
    model(X)
    assert len(made) == 1
    model.attn.__dict__.pop("_old_forward", None)
    del model.attn.forward
    assert set(tfkern.patch(model).changed) == {"attn"}
    model(X)
    assert len(made) == 3


class Theirs(nn.Module):
    """Someone's class for an instance to be changed back to."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return -x


@pytest.mark.parametrize("ours", [timm.Attention, nanogpt.CausalSelfAttention])
def test_bound_methods_follow_the_class(ours):
    module = Theirs()
    module.__class__ = ours
    kept = module.forward
    module.__class__ = Theirs
    if ours is nanogpt.CausalSelfAttention:
        Theirs.forward = lambda self, x: -x
    assert torch.equal(kept(X), -X)


class LoRA(nn.Module):
    """A wrapper in the place of a layer, as peft's."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x, *args, **kwargs):
        out = self.base_layer(x, *args, **kwargs)
        return (out[0] + self.up(self.down(x)), *out[1:])


def test_what_changes_no_class():
    """A layer wrapped as a whole, weights that hooks compute: undone as if nothing had come in between."""
    for change in (
        lambda m: setattr(m, "attn", LoRA(m.attn)),
        lambda m: prune.random_unstructured(m.attn, "in_proj_weight", 0.5),
        lambda m: prune.random_unstructured(m.attn.out_proj, "weight", 0.5),
        lambda m: nn.utils.spectral_norm(m.attn, "in_proj_weight").eval(),
        lambda m: m.attn.register_forward_pre_hook(lambda module, args: None),
        lambda m: m.attn.out_proj.register_parameter("bias", None),
        lambda m: m.double().float(),
    ):
        for block in (False, True):
            model = Model()
            if block:
                with tfkern.patched(model):
                    change(model)
                    want = model(X)
            else:
                tfkern.patch(model)
                change(model)
                want = model(X)
                assert len(tfkern.unpatch(model).changed) == 3
            torch.testing.assert_close(model(X), want)
            assert not any(type(m).__module__.startswith("tfkern") for m in model.modules())


def test_scripted_modules_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated since PyTorch 2.14
        model = nn.ModuleDict(dict(attn=torch.jit.script(layer())))
    report = tfkern.patch(model)
    assert not report.changed
    assert "is compiled by torch.jit" in report.unchanged["attn"]


@pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
def test_an_implementation_that_was_chosen_since():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    model = BertModel._from_config(config, attn_implementation="sdpa")
    tfkern.patch(model)
    assert model.config._attn_implementation == "tfkern"
    model.set_attn_implementation("eager")
    tfkern.unpatch(model)
    assert model.config._attn_implementation == "eager"
