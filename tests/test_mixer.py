"""MLP-Mixer beside timm, both ways, and beside ViT with images of another size."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tfkern.models.mixer import Mixer, MixerConfig
from tfkern.models.pretrained import from_pretrained, save_pretrained
from tfkern.models.vit import ViT, ViTConfig

sys.path.append(str(Path(__file__).resolve().parent))
import foreign

SMALL = MixerConfig(image=16, patch=4, classes=5, layers=2, width=24, tokens_hidden=12, channels_hidden=96)


def of_timm():
    timm = foreign.timm()
    model = timm.models.mlp_mixer.MlpMixer(num_classes=5, img_size=16, patch_size=4, num_blocks=2, embed_dim=24)
    return foreign.filled(model)


def test_parameters_at_base_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Mixer().parameters()) == 59_880_472


@pytest.mark.needs("timm", foreign.there("timm"))
@torch.no_grad()
def test_timm_both_ways(tmp_path):
    reference = of_timm()
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    model = from_pretrained(tmp_path / "timm.safetensors", Mixer, config=SMALL)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    foreign.same(model(images), reference(images))
    save_pretrained(model, tmp_path, "timm")
    again = of_timm()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(again(images), reference(images))
    found = from_pretrained(tmp_path, Mixer)
    assert found.config == SMALL
    assert torch.equal(found(images), model(images))


def test_one_size_only():
    """ViT of the same sizes takes what Mixer refuses."""
    mixer, vit = Mixer(SMALL), ViT(ViTConfig(image=16, patch=4, classes=5, layers=1, heads=2, width=24))
    for shape in [(2, 3, 20, 16), (2, 3, 16, 32), (2, 3, 8, 32)]:  # the last has 16 patches, too
        assert vit(torch.randn(shape)).shape == (2, 5)
        with pytest.raises(
            ValueError, match=r"images must be \(B, 3, 16, 16\), because Mixer has weights for exactly 16 posit"
        ):
            mixer(torch.randn(shape))
    with pytest.raises(ValueError, match="image must be a multiple of patch, but they are 9 and 2"):
        Mixer(MixerConfig(image=9, patch=2))


def test_it_learns():
    """The starting weights let gradients through to every parameter, and a few steps tell two images apart."""
    torch.manual_seed(0)
    model, images, labels = Mixer(SMALL), torch.randn(2, 3, 16, 16), torch.tensor([1, 3])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < 0.1
