"""Who computed a result: the backend of a model's attention, versions, device and seed, for every table and picture."""

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tfkern
from tfkern.nn import SelfAttention
from tfkern.training.trained import Trained
from tfkern.training.trainer import Training

KERNELS = ("portable", "hopper")  # the backends that are ours in Triton


class Call(NamedTuple):
    """The arguments of one call of attention, but the values."""

    query: Tensor  # (B, H, N, D)
    key: Tensor
    options: dict


@contextlib.contextmanager
def calls_of(model: nn.Module) -> Iterator[list[Call]]:
    """Within the block, each SelfAttention of a model leaves the arguments of its calls in the list, layer after layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, SelfAttention)]
    kept, before = [], [layer.attention for layer in layers]

    def recorded(attention):
        def attend(query, key, value, **options):
            kept.append(Call(query, key, options))
            return attention(query, key, value, **options)

        return attend

    for layer in layers:
        layer.attention = recorded(layer.attention)
    try:
        yield kept
    finally:
        for layer, attention in zip(layers, before, strict=True):
            layer.attention = attention


def backend(training: Training, asked: str | None = None) -> str:
    """The backend that computes the attention of a training's steps, by a batch of one row, "" where there is none. Changes no
    generator. asked: the backend that the model's attention asks for by name."""
    task, on = training.task, training.device
    batch = tuple(x.to(on) for x in task.load(task.batch(torch.Generator(), 1)))
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"), training.autocast():
        return chosen(training.model, lambda: task.loss(training.model, batch), asked)


@torch.no_grad()
def chosen(model: nn.Module, run: Callable[[], object], asked: str | None = None) -> str:
    """The backend of a model's attention while something runs it, as tfkern.explain tells for each call."""
    with calls_of(model) as calls:
        run()
    found = [tfkern.explain(c.query, c.key, c.key, **c.options, backend=asked).split()[0] for c in calls]
    return " and ".join(dict.fromkeys(found))


def of_trained(path: Path, trained: Trained, run: Callable[[], object]) -> str:
    """Which checkpoint, how far it was trained, and what computes its attention while something runs it."""
    attention = chosen(trained.model, run)
    by = f"attention by {label(attention, trained.device)}" if attention else "no attention"
    return f"by {path}, after step {trained.done} of {trained.steps}, {by}"


def label(name: str, device: torch.device) -> str:
    """A backend's name, and where it runs if that isn't the CPU itself."""
    if device.type == "cuda":
        return f"{name} on {torch.cuda.get_device_name(device)}"
    return f"{name} in Triton's interpreter" if name in KERNELS else name


def computed_by(names: Iterable[str], device: torch.device, seed: int) -> str:
    """Versions, backends, device and seed in one line. names: of the backends that computed attention."""
    names = list(dict.fromkeys(names))
    by = ", ".join(label(name, device) for name in names)
    triton = f"Triton {importlib.metadata.version('triton')}, " if set(names) & set(KERNELS) else ""
    return f"tfkern {tfkern.__version__}, attention by {by}; {triton}{setting(device, seed)}"


def setting(device: torch.device, seed: int) -> str:
    """PyTorch's version, the dtype of training, the device and the seed."""
    threads = torch.get_num_threads()
    on = f"CPU, {threads} thread{'s'[: threads > 1]}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"torch {torch.__version__.split('+')[0]}, float32, {on}, seed {seed}"
