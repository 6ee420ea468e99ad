"""A small GPT with every weight random, and files of its weights."""

import torch
from torch import nn

from tfkern.models import save_pretrained
from tfkern.models.gpt import GPT, GPTConfig

TINY = GPTConfig(vocab_size=11, context=12, layers=2, heads=3, width=24)


def gpt(config: GPTConfig = TINY) -> GPT:
    """With random biases and norms, which a fresh model does not have."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    for name, p in model.named_parameters():
        if "bias" in name or "norm" in name:
            nn.init.normal_(p, std=0.3)
    return model


def saved(tmp_path, config: GPTConfig = TINY) -> GPT:
    model = gpt(config)
    save_pretrained(model, tmp_path)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    """The same config, and the same bits of every weight."""
    x, y = a.state_dict(), b.state_dict()
    return a.config == b.config and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def save_bin(tmp_path, held) -> str:
    torch.save(held, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"
