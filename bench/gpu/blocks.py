"""Time a training step of whole models (BERT-base, GPT-2 and ViT-B/16) with our attention and with PyTorch's.

A step runs under autocast to bf16, with a fused AdamW and inputs on the device. Its milliseconds show what attention
contributes to the time of training.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

import tfkern
from tfkern.bench import timing
from tfkern.bench.providers import passed_over, pinned_sdpa
from tfkern.models.bert import BERTConfig, MaskedLM
from tfkern.models.gpt import GPT, GPTConfig
from tfkern.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class Model:
    """A model to time: build(tiny, attention) makes it, at its published size or a tiny one; inputs(tiny, batch) makes its
    inputs on the CPU; `batch` is the batch size at the published size."""

    build: Callable[[bool, Callable], nn.Module]
    inputs: Callable[[bool, int], Tensor]
    batch: int


def _ids(vocabulary: int, length: int, tiny_length: int):
    return lambda tiny, batch: torch.randint(100 if tiny else vocabulary, (batch, tiny_length if tiny else length))


def _bert(tiny: bool, attention) -> nn.Module:
    return MaskedLM(BERTConfig(vocab_size=100, context=32, layers=1, heads=2, width=32) if tiny else BERTConfig(), attention)


def _gpt(tiny: bool, attention) -> nn.Module:
    return GPT(GPTConfig(vocab_size=100, context=32, layers=1, heads=2, width=32) if tiny else GPTConfig(), attention)


def _vit(tiny: bool, attention) -> nn.Module:
    return ViT(ViTConfig(image=16, patch=4, classes=10, layers=1, heads=2, width=32) if tiny else ViTConfig(), attention)


MODELS = {
    "bert-base-512": Model(_bert, _ids(30522, 512, 32), 32),
    "gpt2-1024": Model(_gpt, _ids(50257, 1024, 32), 8),
    "vit-b16-197": Model(_vit, lambda tiny, batch: torch.randn(batch, 3, *((16, 16) if tiny else (224, 224))), 64),
}


def _sdpa(kind: SDPBackend | None):
    pinned = pinned_sdpa(kind)

    def attention(q, k, v, *, window=None, key_lengths=None, **options):
        if window is not None or key_lengths is not None:
            raise ValueError("these models are timed without windows and padding")
        return pinned(q, k, v, **options)

    return attention


ATTENTIONS: dict[str, Callable] = {
    "tfkern portable": functools.partial(tfkern.attention, backend="portable"), "sdpa default": _sdpa(None),
    "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION), "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "tfkern hopper": functools.partial(tfkern.attention, backend="hopper"),
}  # fmt: skip


def step_row(model: str, attention: str, device: torch.device, tiny: bool) -> Iterator[dict]:
    """Yield one row with the milliseconds of a training step: median, 20th and 80th percentile. If the attention cannot run,
    the row has the reason as `skipped`."""
    about, batch = MODELS[model], 2 if tiny else MODELS[model].batch
    torch.manual_seed(0)
    module = about.build(tiny, ATTENTIONS[attention]).to(device)
    inputs = about.inputs(tiny, batch).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            logits = module(inputs)
        # the targets are arbitrary, but every logit takes part in the loss, as in training
        F.cross_entropy(logits.flatten(0, -2).float(), logits.flatten(0, -2).argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        p20, p50, p80 = timing.milliseconds(step, device, 0.01 if tiny else 1.0)
    except RuntimeError as error:
        yield dict(model=model, attention=attention, skipped=passed_over(attention, error))
        return
    yield dict(model=model, attention=attention, batch=batch, ms=p50, p20=p20, p80=p80)
