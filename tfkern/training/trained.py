"""A model out of a checkpoint, without its data: what generating and classifying need."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tfkern.models import tokens
from tfkern.models.tokens import Tokenizer
from tfkern.training import checkpoints, kinds
from tfkern.training.checkpoints import CheckpointError
from tfkern.training.tasks import Task


@dataclass(frozen=True)
class Form:
    """What a model is and what its inputs and outputs mean."""

    kind: str
    config: kinds.Config
    tokenizer: Tokenizer | None
    classes: tuple[str, ...]

    @classmethod
    def of(cls, task: Task) -> "Form":
        own = task.data
        return cls(task.kind, task.model_config, getattr(own, "tokenizer", None), getattr(own, "classes", ()))

    def told(self) -> dict[str, str]:
        """As a checkpoint keeps it."""
        return dict(
            kind=self.kind,
            config=json.dumps(dataclasses.asdict(self.config)),
            tokenizer=self.tokenizer.to_json() if self.tokenizer else "",
            classes=json.dumps(self.classes),
        )

    @classmethod
    def read(cls, about: dict[str, str]) -> "Form":
        """What `told` gave. KeyError, TypeError or ValueError for that of another version."""
        config = kinds.MODELS[about["kind"]].config_class(**json.loads(about["config"]))
        tokenizer = tokens.from_json(about["tokenizer"]) if about["tokenizer"] else None
        return cls(about["kind"], config, tokenizer, tuple(json.loads(about["classes"])))


@dataclass(frozen=True)
class Trained:
    """A trained model on its device, in training mode off."""

    form: Form
    model: nn.Module
    device: torch.device
    done: int
    steps: int

    @classmethod
    def read(cls, path: Path, attention: Callable[..., Tensor], device, wanted: tuple[str, ...]) -> "Trained":
        """From a checkpoint of `tfkern train` of one of the wanted kinds. CheckpointError if it is not one."""
        about, tensors = checkpoints.read(path)
        form, device = read_form(path, about, wanted), torch.device(device)
        with refusing_others(path, form.kind):
            with torch.random.fork_rng(devices=[]):  # first weights are drawn, and then replaced
                model = kinds.build(form.kind, form.config, attention)
            model.load_state_dict(checkpoints.under("model.", tensors))
            steps = json.loads(about["recipe"])["steps"]
        return cls(form, model.to(device).eval(), device, len(tensors["losses"]), steps)


def read_form(path: Path, about: dict[str, str], wanted: tuple[str, ...]) -> Form:
    """The form that a checkpoint tells. CheckpointError unless its kind is wanted."""
    kind = about.get("kind", "")
    if kind not in wanted and kind in kinds.MODELS:
        makes = f"; `tfkern train {wanted[0]}` makes one" if len(wanted) == 1 else ""
        raise CheckpointError(f"{path} is of {kind}, but {' or '.join(wanted)} is wanted{makes}")
    with refusing_others(path, kind):
        return Form.read(about)


@contextlib.contextmanager
def refusing_others(path: Path, kind: str) -> Iterator[None]:
    """Within the block, whatever does not fit this version is a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is of another version's {kind} ({what}); train anew") from None
