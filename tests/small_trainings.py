"""Trainings that take a second: the tasks of every kind at their smallest, and data of a user's own in files."""

import dataclasses
from pathlib import Path

import torch

from tfkern.models.bert import BERTConfig
from tfkern.training import opening
from tfkern.training.classifying import ReadImages
from tfkern.training.presets import PRESETS, TASKS
from tfkern.training.recipe import Recipe
from tfkern.training.tasks import Task


def small(name: str, **settings) -> Task:
    """A task of the demo's, or of Mixer, with one block and a batch of four; settings are the recipe's."""
    if name == "mixer":
        preset = PRESETS["mixer-small"]
        task = ReadImages(preset.config, preset.recipe, kind="mixer")
    else:
        task = TASKS[name]
    config = dataclasses.replace(task.config, layers=1, width=16)
    return dataclasses.replace(task, config=config, recipe=task.recipe.changed(**{"rows": 4, **settings}))


def judging(folder: Path, **settings) -> Task:
    """BERT's classifier with dropout, on sentences of several lengths in a file that is written."""
    recipe = Recipe(**{"steps": 8, "rows": 4, "learning_rate": 1e-2, **settings})
    config = BERTConfig(context=16, segments=1, layers=1, heads=2, width=16, dropout=0.1)
    return opening.task("bert-classifier", config, recipe, sentences(folder / "s.tsv"))


def sentences(path: Path, count: int = 20) -> Path:
    """Lines whose label tells whether there is an x in the sentence."""
    lines = (f"{'with' if n % 2 else 'without'}\t{'ab' * (n % 5)}{'x' if n % 2 else 'y'} a" for n in range(count))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def pictures(folder: Path, count: int = 10, size: tuple[int, int] = (11, 9)) -> Path:
    """Images of two classes, bright and dark, in subfolders."""
    from PIL import Image

    for name, level in (("bright", 200), ("dark", 40)):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", size, (level + n, level, level - n)).save(folder / name / f"{n}.png")
    return folder


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
