"""Models of transformers and timm as references: imported, filled with numbers that tell all weights apart, and loaded from ours."""

import contextlib
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent))
import torchvision_stub


def there(*names: str) -> bool:
    """Whether packages can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in names)


def transformers():
    """The package, quiet."""
    module = importlib.import_module("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def timm():
    """The package, without torchvision."""
    with torchvision_stub.installed():
        return importlib.import_module("timm")


def filled(model: nn.Module, size: float = 0.3) -> nn.Module:
    """The model in evaluation mode, every parameter random; norms around 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = size * torch.randn(p.shape, generator=generator)
            p.copy_(1 + x if "norm" in name.lower() and name.endswith("weight") else x)
    return model.eval()


def loaded(cls, folder: Path) -> nn.Module:
    """A model of transformers from a folder that we wrote. Nothing may be missing or be too much."""
    model, found = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def same(out: torch.Tensor, wanted: torch.Tensor) -> None:
    """As far as float32 can tell."""
    assert wanted.abs().max() > 0.1  # a result that could differ
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=2e-5)


@contextlib.contextmanager
def warned(*parts: str):
    """Within the block there must be one warning, with all of these in it."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert len(found) == 1, [str(w.message) for w in found]
    assert all(part in str(found[0].message) for part in parts), found[0].message
