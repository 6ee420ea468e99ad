"""One training loop for every task, and checkpoints from which it goes on bit for bit."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tfkern.training import data
from tfkern.training.tasks import TASKS, Task

FORMAT = "tfkern-training-1"


class CheckpointError(RuntimeError):
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
        """Write everything to one safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["rng"] = torch.get_rng_state()
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        about = dict(format=FORMAT, task=json.dumps(dataclasses.asdict(self.task)), characters=data.corpus().characters)
        partial = path.with_name(path.name + ".partial")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial, {**about, "steps": str(self.steps)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, attention: Callable[..., Tensor], device="cpu") -> "Training":
        """The training that `save` wrote, on any device. CheckpointError if the file isn't one."""
        about, tensors = _read(path)
        settings = json.loads(about["task"])
        if settings["name"] != "vit" and about["characters"] != data.corpus().characters:
            raise CheckpointError(f"{path} was trained on another Python's text, whose characters differ; train anew")
        task = type(TASKS[settings["name"]])(**settings)
        self = cls.start(task, attention, int(about["steps"]), device=device)
        self.model.load_state_dict(_under("model.", tensors))
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; `tfkern train` writes one") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); remove it and train anew") from None
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file, but no checkpoint of `tfkern train` (format {about.get('format')!r})"
        )
    return about, tensors


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
