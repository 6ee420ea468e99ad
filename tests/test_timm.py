"""timm: models with our attention layer and models that are patched, beside timm's own layer."""

import copy
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tfkern
from tfkern.integrations import timm as integration
from tfkern.testing import budget

sys.path.append(str(Path(__file__).resolve().parent))
import torchvision_stub
from readme import recipe

pytestmark = pytest.mark.needs("timm", importlib.util.find_spec("timm") is not None)
TINY = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)
MODELS = {  # name: (timm's name, options, layers that an adapter knows)
    "ViT": ("vit_tiny_patch16_224", {}, 2),
    "ViT, query and key normalised": ("vit_tiny_patch16_224", dict(qk_norm=True), 2),
    "ViT, attention normalised": ("vit_tiny_patch16_224", dict(scale_attn_norm=True), 2),
    "DeiT": ("deit_tiny_patch16_224", {}, 2),
    "DINOv2": ("vit_small_patch14_dinov2", {}, 2),
    "CLIP's ViT": ("vit_base_patch32_clip_224", {}, 2),
    "SigLIP's ViT (pooled by attention)": ("vit_base_patch16_siglip_224", {}, 2),
}


@pytest.fixture(scope="module", autouse=True)
def timm():
    with torchvision_stub.installed():
        return importlib.import_module("timm")


def make(timm, name: str, seed: int = 0, **more) -> nn.Module:
    model = timm.create_model(MODELS[name][0], **TINY, **MODELS[name][1], **more)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            x = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * x if p.dim() == 1 and path.endswith("weight") else 0.2 * x)
    return model.eval()


def results(model: nn.Module, dtype=torch.float32, autocast=None, **options) -> dict:
    """The output and every parameter's gradient."""
    model = model.to(dtype)
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = model(x, **options)
    (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum().backward()
    return {"out": out.detach().clone()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def unfused(model: nn.Module) -> nn.Module:
    """timm's own formula, written out."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def attending(monkeypatch) -> list:
    """What calls of tfkern's attention were made."""
    made = []
    for name in ("attention", "attention_packed"):
        real = getattr(integration, name)
        monkeypatch.setattr(integration, name, lambda *a, real=real, **k: (made.append(1), real(*a, **k))[1])
    return made


def judge(timm, found: dict, name: str, autocast=None) -> None:
    """found against timm's own formula in float64, beside the same in float32 or under autocast."""

    def theirs(dtype=torch.float64, autocast=None):
        return results(unfused(make(timm, name)), dtype, autocast)

    truth = theirs()
    assert found.keys() == truth.keys()
    errors = budget.judge(found, truth, [theirs(torch.float32, autocast)], theirs, products=autocast or torch.float32)
    assert not [str(e) for e in errors if not e.ok]


@pytest.mark.parametrize("way", ["attn_layer", "patch"])
@pytest.mark.parametrize("name", MODELS)
def test_models(timm, name, way, monkeypatch):
    made = attending(monkeypatch)
    if way == "patch":
        model = make(timm, name)
        report = tfkern.patch(model)
        assert len(report.changed) == MODELS[name][2]
        assert set(report.changed.values()) == {"timm.layers.Attention -> tfkern.integrations.timm.Attention"}
    else:
        model = make(timm, name, attn_layer=integration.Attention)
    found = results(model)
    assert len(made) == MODELS[name][2]
    judge(timm, found, name)


@pytest.mark.parametrize("name", MODELS)
def test_autocast(timm, name):
    model = make(timm, name, attn_layer=integration.Attention)
    judge(timm, results(model, autocast=torch.bfloat16), name, torch.bfloat16)


@pytest.mark.parametrize(
    "options", [dict(), dict(gated=True), dict(attn_head_dim=6, dim_out=20), dict(proj_bias=False)], ids=str
)
@pytest.mark.parametrize("normed", [False, True], ids=["in place", "normalised"])
@pytest.mark.parametrize("masked", [None, "bool", "float", "causal"])
def test_the_layer(timm, options, masked, normed):
    """Parameters by the same names, in the same order, from the same draws; masks; the gradient of a float one."""
    layers = []
    for cls in (timm.layers.Attention, integration.Attention):
        torch.manual_seed(0)
        layers.append(cls(24, 4, qkv_bias=True, qk_norm=normed, scale_norm=normed, norm_layer=nn.LayerNorm, **options))
    theirs, ours = layers
    assert [(n, p.shape) for n, p in theirs.state_dict().items()] == [(n, p.shape) for n, p in ours.state_dict().items()]
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert [n for n, _ in theirs.named_modules()] == [n for n, _ in ours.named_modules()]
    assert {k for k in vars(theirs) if k[0] != "_"} == {k for k in vars(ours) if k[0] != "_"}
    torch.manual_seed(1)
    x = torch.randn(2, 7, 24)
    mask = torch.randn(2, 4, 7, 7).requires_grad_() if masked == "float" else None
    if masked == "bool":
        mask = torch.rand(2, 1, 7, 7) > 0.3
        mask[..., 0] = True
    grads = []
    for layer in layers:
        out = layer(x, attn_mask=mask, is_causal=masked == "causal")
        wanted = [*layer.parameters(), *([mask] if masked == "float" else [])]
        grads.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, but they are 10 and 4"):
        integration.Attention(10, 4)
    with pytest.raises(ValueError, match="norm_layer must be given with qk_norm or scale_norm"):
        integration.Attention(8, 4, qk_norm=True)


@pytest.mark.parametrize("where", ["attn_drop", "proj_drop"])
def test_dropout_is_trainings(where):
    torch.manual_seed(0)
    layer, x = integration.Attention(8, 2, **{where: 0.5}), torch.randn(1, 6, 8)
    assert ((layer(x) == 0).float().mean() > 0.2) == (where == "proj_drop")
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_patch_and_back(timm):
    model = make(timm, "ViT")
    model.blocks[0].attn.register_forward_hook(print)
    before = pickle.dumps(vars(model.blocks[0].attn)), [type(m) for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    with tfkern.patched(model):
        assert type(model.blocks[1].attn) is integration.Attention
        assert [p.data_ptr() for p in model.parameters()] == pointers
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert len(tfkern.unpatch(copied).changed) == 2
        assert type(copied.blocks[0].attn) is timm.layers.Attention
    assert (pickle.dumps(vars(model.blocks[0].attn)), [type(m) for m in model.modules()]) == before


def test_fused_attn_is_theirs_to_set(timm):
    """False, before patching or after, lets hooks on attn_drop see the weights, as in timm."""
    model = unfused(make(timm, "ViT"))
    report = tfkern.patch(model)
    assert not report.changed
    assert "its fused_attn is False" in report.unchanged["blocks.0.attn"]
    for block in model.blocks:
        block.attn.fused_attn = True
    tfkern.patch(model)
    layer, x = unfused(model).blocks[0].attn, torch.randn(2, 7, 32)
    assert type(layer) is integration.Attention
    seen = []
    layer.attn_drop.register_forward_hook(lambda module, given, weights: seen.append(weights))
    mask = torch.rand(2, 1, 7, 7) > 0.3
    mask[..., 0] = True
    for options in ({}, dict(is_causal=True), dict(attn_mask=mask), dict(attn_mask=torch.randn(7, 7))):
        want = layer(x, **options), timm.layers.Attention.forward(layer, x, **options)
        torch.testing.assert_close(*want)
        torch.testing.assert_close(seen[-2], seen[-1])
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cait_xxs24_224", dict(), {"blocks.0.attn": "TalkingHeadAttn", "blocks_token_only.0.attn": "ClassAttn"}),
        ("xcit_nano_12_p16_224", dict(), {"blocks.0.attn": "XCA"}),
        ("convit_tiny", dict(local_up_to_layer=1), {"blocks.0.attn": "GPSA", "blocks.1.attn": "MHSA"}),
    ],
)
def test_layers_whose_names_tell_little_are_named(timm, name, options, expected):
    more = dict(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=3) | options
    report = tfkern.patch(timm.create_model(name, **more))
    assert not report.changed
    for path, cls in expected.items():
        assert f".{cls}; where it calls F.scaled_dot_product_attention" in report.unchanged[path]


def test_other_layers_are_named(timm):
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    report = tfkern.patch(model)
    assert not report.changed
    assert "EvaAttention" in report.unchanged["blocks.0.attn"] or "AttentionRope" in report.unchanged["blocks.0.attn"]


def test_the_recipe_in_the_readme(timm, capsys):
    exec(recipe("timm"), run := {})
    assert type(run["model"].blocks[0].attn) is integration.Attention
    assert "changed (12)" in capsys.readouterr().out


def test_without_timm(timm, python_without, tmp_path):
    """The layer needs none; to make timm's of a patched one again does."""
    layer = timm.layers.Attention(8, 2)
    tfkern.patch(layer)
    torch.save(layer, tmp_path / "layer.pt")
    code = (
        "import torch, tfkern; from tfkern.integrations.timm import Attention; print(Attention(8, 2).proj)\n"
        f"layer = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False)\n"
        "try: tfkern.unpatch(layer)\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run(python_without("\n" + code, "timm"), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Linear(in_features=8")
    assert "pip install '.[timm]'" in done.stdout
