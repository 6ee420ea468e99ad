"""Weights to begin a training with: those of an earlier one, or of a folder that others wrote."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from tfkern.ending import InputError
from tfkern.models.bert import BERT, MaskedLM
from tfkern.models.files import WeightsError
from tfkern.models.pretrained import from_pretrained
from tfkern.models.tokens import Subwords, Tokenizer
from tfkern.training import checkpoints, kinds
from tfkern.training.trained import Trained

# Of which kinds a checkpoint may be that a training of a kind begins with.
SUITED = {
    "gpt": ("gpt",), "bert": ("bert",), "bert-classifier": ("bert", "bert-classifier"), "vit": ("vit",), "mixer": ("mixer",),
}  # fmt: skip
FRESH = r"head\.|bert\.pooler\."  # what keeps its first values where the other model has none, or has other classes


@dataclass(frozen=True)
class Origin:
    """A model's sizes, its tokenizer if it brings one, and its weights."""

    path: Path
    config: kinds.Config
    tokenizer: Tokenizer | None
    state: dict[str, Tensor]

    def give(self, model: nn.Module) -> None:
        """Give a fresh model these weights. InputError if more than a head has none of its own."""
        wanted = model.state_dict()
        fits = {k: v for k, v in self.state.items() if k in wanted and v.shape == wanted[k].shape}
        if left := [name for name in wanted if name not in fits and not re.match(FRESH, name)]:
            raise InputError(f"--from {self.path} does not fit: it has no weights of the right shape for {', '.join(left[:4])}")
        model.load_state_dict(fits, strict=False)


def read(path: Path, kind: str, attention: Callable[..., Tensor]) -> Origin:
    """A checkpoint of `tfkern train`, or what tfkern.models.pretrained reads, with its tokenizer.json if there is one."""
    if not path.exists():
        raise InputError(f"--from must be a checkpoint of `tfkern train` or a folder of weights, but there is no {path}")
    if checkpoints.is_one(path):
        trained = Trained.read(path, attention, "cpu", SUITED[kind])
        return Origin(path, trained.form.config, trained.form.tokenizer, trained.model.state_dict())
    model, state = _from_others(path, kind, attention)
    told = (path if path.is_dir() else path.parent) / "tokenizer.json"
    return Origin(path, model.config, Subwords.read(told) if told.exists() else None, state)


def _from_others(path: Path, kind: str, attention: Callable[..., Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of others and its weights by the names that they have in a model of a kind."""
    if kind == "mixer":
        raise InputError(f"--from must be a checkpoint of `tfkern train mixer`, but is {path}")
    if kind != "bert-classifier":
        model = from_pretrained(path, kinds.MODELS[kind], attention=attention)
        return model, model.state_dict()
    try:
        model = from_pretrained(path, BERT, attention=attention)
        return model, {f"bert.{name}": x for name, x in model.state_dict().items()}
    except WeightsError:  # a masked language model has no pooler
        model = from_pretrained(path, MaskedLM, attention=attention)
        return model, model.state_dict()
