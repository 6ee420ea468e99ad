"""One training loop for every task, and checkpoints from which it goes on bit for bit."""

import dataclasses
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tfkern.ending import InputError
from tfkern.training import data
from tfkern.training.tasks import TASKS, Task

FORMAT = "tfkern-training-2"


class CheckpointError(InputError):
    """A file that is no checkpoint of this training; the message says what is wrong and what to do."""


@dataclasses.dataclass
class Training:
    """A model under training: all that its next step depends on."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    steps: int
    device: torch.device
    losses: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, task: Task, attention: Callable[..., Tensor], steps: int | None = None, seed: int = 0, device="cpu"):
        """A fresh one of `steps` steps (default: the task's own). Weights and batches follow from the seed alone."""
        device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = task.build(attention).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        return cls(task, model, optimizer, torch.Generator().manual_seed(seed), steps or task.steps, device)

    def step(self) -> float:
        """One update; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.learning_rate * schedule(len(self.losses), self.steps)
        self.model.train()
        batch = tuple(x.to(self.device) for x in self.task.batch(self.generator))
        loss = self.task.loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def run(self, until: int | None = None, on_step: Callable[["Training"], bool | None] | None = None) -> None:
        """Step until `until` steps are done in all (default: the end), or until on_step, called after each, returns True."""
        while len(self.losses) < min(self.steps, self.steps if until is None else until):
            self.step()
            if on_step is not None and on_step(self):
                return

    def score(self):
        self.model.eval()
        with torch.no_grad():
            return self.task.score(self.model, self.device)

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, whole or not at all; OSError, and nothing left behind, if it can't be."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["rng"] = torch.get_rng_state()
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
        about = dict(format=FORMAT, task=json.dumps(dataclasses.asdict(self.task)), characters=data.corpus().characters)
        about["steps"] = str(self.steps)
        about["sha256"] = _checksum(about, tensors)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, about)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # safetensors raises its own for a full disk
            partial.unlink(missing_ok=True)
            raise OSError(errno.EIO, f"the checkpoint can't be written ({error})", str(path)) from None

    @classmethod
    def load(cls, path: Path, attention: Callable[..., Tensor], device="cpu", model: str | None = None) -> "Training":
        """The training that `save` wrote, on any device, of `model` if one is named. CheckpointError if the file isn't one."""
        about, tensors = _read(path)
        settings = json.loads(about["task"])
        name = settings["name"]
        if model not in (None, name):
            raise CheckpointError(f"{path} is of {name}, but {model} is wanted; `tfkern train {model}` makes one")
        if name != "vit" and about["characters"] != data.corpus().characters:
            raise CheckpointError(f"{path} was trained on another Python's text, whose characters differ; train anew")
        try:
            task = type(TASKS[name])(**settings)
            self = cls.start(task, attention, int(about["steps"]), device=device)
            self.model.load_state_dict(_under("model.", tensors))
        except (KeyError, TypeError, RuntimeError) as error:
            what = str(error).splitlines()[0]
            raise CheckpointError(f"{path} is of another version's {name} ({what}); train anew") from None
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", tensors).items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["rng"])
        self.losses = tensors["losses"].tolist()
        return self


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up over the first tenth, then a half cosine down to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What `save` wrote about a training, and its tensors."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file in it that `tfkern train` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; `tfkern train` writes one") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error}); name a file that `tfkern train` wrote") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); remove it and train anew") from None
    found = about.get("format")
    if not str(found).startswith("tfkern-training-"):
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of `tfkern train` (format {found!r})")
    if found != FORMAT:
        raise CheckpointError(f"{path} is of another version of tfkern (format {found!r}, here {FORMAT!r}); train anew")
    if about.pop("sha256", None) != _checksum(about, tensors):
        raise CheckpointError(f"{path} is damaged: its contents don't have the checksum that it was written with; train anew")
    return about, tensors


def _checksum(about: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all that a checkpoint says."""
    found = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
