"""Sizes and recipes by name, for a CPU and as published. Flags of `tfkern train` change single values.

Every recipe has the learning rate fall to a tenth by a half cosine, and draws examples at random with replacement. Images
are not augmented (no RandAugment, no mixup), so a published recipe does not promise the published accuracy.
"""

from dataclasses import dataclass

from tfkern.models.bert import BERTConfig
from tfkern.models.gpt import GPTConfig
from tfkern.models.mixer import MixerConfig
from tfkern.models.vit import ViTConfig
from tfkern.training.classifying import ReadImages
from tfkern.training.kinds import Config
from tfkern.training.recipe import Recipe
from tfkern.training.tasks import FillIn, LearnText, Task


@dataclass(frozen=True)
class Preset:
    """A model's sizes, which the data completes by its vocabulary or classes, and how it is trained."""

    model: str
    config: Config
    recipe: Recipe
    classify: Recipe | None = None  # bert alone: fine-tuning on labelled sentences
    source: str = "chosen for two CPU cores"


PRESETS = {
    "gpt-small": Preset(
        "gpt",
        GPTConfig(context=64, layers=2, heads=4, width=128),
        Recipe(steps=500, rows=12, learning_rate=5e-3),
    ),
    "gpt2": Preset(
        "gpt",
        GPTConfig(),
        Recipe(
            steps=600_000, rows=480, learning_rate=6e-4, warmup=2000, weight_decay=0.1, betas=(0.9, 0.95), accumulate=40,
            amp="bf16",
        ),
        source="sizes: Radford et al. 2019; recipe: GPT-3 Small of Brown et al. 2020, steps as in nanoGPT",
    ),
    "bert-small": Preset(
        "bert",
        BERTConfig(context=32, segments=1, layers=2, heads=4, width=64),
        # Twice the paper's mask share: so small a model learns faster from more (Wettig et al., "Should You Mask 15% in
        # Masked Language Modeling?", 2023).
        Recipe(steps=1200, rows=32, learning_rate=2e-3, mask_share=0.3),
        classify=Recipe(steps=300, rows=16, learning_rate=1e-3),
    ),
    "bert-base": Preset(
        "bert",
        BERTConfig(dropout=0.1),
        Recipe(
            steps=1_000_000, rows=256, learning_rate=1e-4, warmup=10_000, weight_decay=0.01, betas=(0.9, 0.999), accumulate=8,
            amp="bf16",
        ),
        classify=Recipe(steps=1000, rows=32, learning_rate=3e-5, weight_decay=0.01, betas=(0.9, 0.999), amp="bf16"),
        source="Devlin et al. 2019, A.2 and A.3; dropout 0.1, but not of attention weights",
    ),
    "vit-small": Preset(
        "vit",
        ViTConfig(image=8, patch=2, channels=1, layers=2, heads=4, width=48),
        Recipe(steps=300, rows=64, learning_rate=4e-3),
    ),
    "vit-32": Preset(
        "vit",
        ViTConfig(image=32, patch=4, layers=4, heads=4, width=96),
        Recipe(steps=500, rows=64, learning_rate=2e-3, weight_decay=0.05, betas=(0.9, 0.999)),
    ),
    "vit-b16": Preset(
        "vit",
        ViTConfig(dropout=0.1),
        Recipe(
            steps=93_800, rows=4096, learning_rate=3e-3, warmup=10_000, weight_decay=0.3, betas=(0.9, 0.999), accumulate=16,
            amp="bf16",
        ),
        source="Dosovitskiy et al. 2021, table 3: 300 epochs of ImageNet",
    ),
    "mixer-small": Preset(
        "mixer",
        MixerConfig(image=8, patch=2, channels=1, layers=2, width=48, tokens_hidden=32, channels_hidden=192),
        Recipe(steps=300, rows=64, learning_rate=4e-3),
    ),
    "mixer-32": Preset(
        "mixer",
        MixerConfig(image=32, patch=4, layers=4, width=96, tokens_hidden=96, channels_hidden=384),
        Recipe(steps=500, rows=64, learning_rate=2e-3, weight_decay=0.05, betas=(0.9, 0.999)),
    ),
    "mixer-b16": Preset(
        "mixer",
        MixerConfig(),
        Recipe(
            steps=93_800, rows=4096, learning_rate=1e-3, warmup=10_000, weight_decay=0.1, betas=(0.9, 0.999), accumulate=16,
            amp="bf16",
        ),
        source="Tolstikhin et al. 2021, table 4: 300 epochs of ImageNet",
    ),
}  # fmt: skip
# Where weights are there already (--from), and no preset is named.
TUNING = Recipe(steps=500, rows=16, learning_rate=3e-5, betas=(0.9, 0.999))
# What a model's training takes where none is named: with the built-in data, and with a user's own.
BUILT_IN = {"gpt": "gpt-small", "bert": "bert-small", "vit": "vit-small", "mixer": "mixer-small"}
OWN = {**BUILT_IN, "vit": "vit-32", "mixer": "mixer-32"}


def _built_in(model: str) -> Task:
    preset = PRESETS[BUILT_IN[model]]
    task = {"gpt": LearnText, "bert": FillIn}.get(model)
    return task(preset.config, preset.recipe) if task else ReadImages(preset.config, preset.recipe, kind=model)


# What `tfkern demo` trains.
TASKS: dict[str, Task] = {model: _built_in(model) for model in ("gpt", "bert", "vit")}
