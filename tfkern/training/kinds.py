"""The kinds of models that are trained, by the names that commands and checkpoints have for them."""

from collections.abc import Callable

from torch import Tensor, nn

from tfkern.models.bert import BERTConfig, Classifier, MaskedLM
from tfkern.models.gpt import GPT, GPTConfig
from tfkern.models.mixer import Mixer, MixerConfig
from tfkern.models.vit import ViT, ViTConfig

Config = GPTConfig | BERTConfig | ViTConfig | MixerConfig
MODELS = {"gpt": GPT, "bert": MaskedLM, "bert-classifier": Classifier, "vit": ViT, "mixer": Mixer}


def build(kind: str, config: Config, attention: Callable[..., Tensor]) -> nn.Module:
    """A fresh model; its weights follow from PyTorch's default generator."""
    return MODELS[kind](config, attention)
