"""The kinds of models that are trained: their sizes and how each is built."""

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from tfkern.models.bert import BERTConfig, Classifier, MaskedLM
from tfkern.models.gpt import GPT, GPTConfig
from tfkern.models.mixer import Mixer, MixerConfig
from tfkern.models.vit import ViT, ViTConfig

Config = GPTConfig | BERTConfig | ViTConfig | MixerConfig
CONFIGS: dict[str, type[Config]] = {
    "gpt": GPTConfig, "bert": BERTConfig, "bert-classifier": BERTConfig, "vit": ViTConfig, "mixer": MixerConfig,
}  # fmt: skip


def build(kind: str, config: Config, classes: tuple[str, ...], attention: Callable[..., Tensor]) -> nn.Module:
    """A fresh model. Of `classes` the number counts, where the config does not have it."""
    match kind:
        case "gpt":
            return GPT(config, attention)
        case "bert":
            return MaskedLM(config, attention)
        case "bert-classifier":
            return Classifier(config, len(classes), attention)
        case "vit":
            return ViT(config, attention)
        case "mixer":
            return Mixer(config)
    raise KeyError(kind)


def fitted(config: Config, vocab_size: int | None = None, classes: int | None = None) -> Config:
    """The config for what the data has."""
    changes = dict(vocab_size=vocab_size, classes=classes)
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
