"""Reference models with weights from elsewhere: `from_pretrained` reads them, `save_pretrained` writes them.

What everything is called there is in the tables of tfkern/models/weights.py.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tfkern.functional import attention as fused_attention
from tfkern.models.files import (
    NAMES,
    WeightsError,
    line,
    read,
    read_json,
    weights_file,
    write_json,
    write_nanogpt,
    write_safetensors,
)
from tfkern.models.sizes import config_from, told_config
from tfkern.models.weights import LAYOUTS, Layout


@dataclass
class Report:
    """What of a checkpoint does not fit a model, by its own names."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mis_shaped: list[str] = field(default_factory=list)  # with both shapes
    untied: list[str] = field(default_factory=list)  # copies that differ from what they are copies of

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return any(self.lists().values())

    def lists(self) -> dict[str, list[str]]:
        return {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape or kind": self.mis_shaped,
            "not a copy of the weight it is tied to": self.untied,
        }

    def __str__(self) -> str:
        return "\n".join(f"{what} ({len(names)}): {_first(names)}" for what, names in self.lists().items() if names)


def from_pretrained(
    path: str | Path, model: type[nn.Module] | None = None, *, attention: Callable[..., Tensor] = fused_attention, config=None,
    source: str | None = None, strict: bool = True, dtype: torch.dtype = torch.float32, **changes,
) -> nn.Module:  # fmt: skip
    """A reference model with the weights of a checkpoint, on the CPU, in eval mode.

    Args:
        path: a folder as transformers writes it (config.json with model.safetensors or pytorch_model.bin, or their shards), a
            file of weights with a config.json beside it, nanoGPT's ckpt.pt, or a Llama's .gguf.
        model: a class of LAYOUTS, such as tfkern.models.bert.MaskedLM; None takes the one that config.json names.
        attention: a function with the arguments of tfkern.attention.
        config: the model's config, in place of config.json.
        source: whose layout the file has, such as "timm"; None takes the one that fits best.
        strict: whether every weight must be there, nothing else, and all of the right shape. Else what does not fit keeps
            its first values, and a warning lists it.
        dtype: of the model's weights.
        changes: fields of the config that are to be other than told, such as dropout=0.1.

    Raises: WeightsError for a file that can't be read, a config that asks for what the model does not compute, or weights
        that don't fit. Pickles are read without running code from them. MissingExtraError for a format whose package is
        not installed.
    """
    file = weights_file(Path(path))
    state, told = read(file)
    beside = file.parent / "config.json"
    if not told and config is None:
        if not beside.is_file():
            called = model.__name__ if model else "the model"
            raise WeightsError(f"there is no {beside} that tells the sizes of {called}; give them as config=, with model=")
        told = read_json(beside)
    model = model or _model_named(told, beside)
    fit = _best_fit(model, state, told, config, source, changes)
    if fit.report and strict:
        raise WeightsError(
            f"the weights of {file} don't fit {model.__name__} in the layout of {fit.layout.source}:\n{fit.report}"
        )
    if fit.report:
        with torch.device("cpu"):
            new = model(fit.config, attention)
    else:  # where all is read, nothing is drawn
        new = _without_memory(model, fit.config, attention)
    new.load_state_dict(fit.weights(state, dtype), strict=False, assign=True)
    if fit.report:
        warnings.warn(f"of the weights of {file}, these are not used, or keep their first values:\n{fit.report}", stacklevel=2)
    return new.to(dtype).eval()


def save_pretrained(model: nn.Module, folder: str | Path, source: str = "transformers") -> None:
    """Write a model by others' names, as they can read it. The folder is made if it isn't there.

    For nanoGPT it is ckpt.pt, with the sizes as model_args, for all others model.safetensors and config.json. A file is
    there whole, or as it was before.

    Raises: WeightsError for a model that the source has no layout for, or a folder whose other weights from_pretrained would
        read first; OSError where the disk refuses.
    """
    layout, folder = _layout(type(model), source), Path(folder)
    if layout.source == "gguf":
        raise WeightsError("source must not be 'gguf', which is read but not written; choose 'transformers'")
    told, state = told_config(model.config, layout), named(model, layout)
    if layout.source == "nanoGPT":
        state |= {copy: state[layout.prefix + name] for copy, name in layout.tied.items()}  # which nanoGPT wants to find
        if others := [name for name in NAMES if name != "ckpt.pt" and (folder / name).exists()]:
            raise WeightsError(f"{folder} has {others[0]}, which would be read in place of ckpt.pt; choose another folder")
        write_nanogpt(folder / "ckpt.pt", state, {key: told[key] for key in told if key != "architectures"})
    else:
        write_safetensors(folder / "model.safetensors", state)
        write_json(folder / "config.json", told)


def named(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The state dict of a model by others' names; contiguous, of the model's own memory where the layout allows it."""
    state = {}
    for _, tensor, theirs, transposed in layout.rows(model):
        parts = [part.t() if transposed else part for part in tensor.detach().chunk(len(theirs))]
        state |= {layout.prefix + name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return state


class Row(NamedTuple):
    """Where one of our weights comes from."""

    ours: str
    theirs: list[str]  # names in the file; none for a bias that is left out, which is 0
    shape: torch.Size
    transposed: bool

    def value(self, state: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, in memory of its own. It is removed from the state, so that a large model is not in memory twice."""
        if not self.theirs:
            return torch.zeros(self.shape, dtype=dtype, device="cpu")
        parts = [state.pop(name) for name in self.theirs]
        return torch.cat([part.t() if self.transposed else part for part in parts]).to(dtype)


class Fit(NamedTuple):
    """How well a checkpoint fits a model by one layout: the weights that can be loaded, and those that don't fit."""

    layout: Layout
    config: object
    rows: list[Row]
    report: Report

    def weights(self, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights that fit, by our names, taken out of the state."""
        return {row.ours: row.value(state, dtype) for row in self.rows}


def _best_fit(model, state, told, config, source, changes) -> Fit:
    """By that of a model's layouts which leaves least over."""
    _check(model)
    named = [layout for layout in LAYOUTS[model] if layout.architecture in _architectures(told)]
    fits, problems = [], []
    for layout in [_layout(model, source)] if source else named or LAYOUTS[model]:
        try:
            tried = replace(config, **changes) if config else config_from(told, layout, model, **changes)
            fits.append(_fit(model, tried, layout, state))
        except WeightsError as error:
            problems.append(error)
    if not fits:
        raise problems[0]
    return min(fits, key=lambda fit: sum(map(len, fit.report.lists().values())))


def _fit(model: type[nn.Module], config, layout: Layout, state: dict[str, Tensor]) -> Fit:
    plain = _plain_names(state, layout)
    left, rows, report = dict(plain), [], Report()
    without_biases = layout.may_lack_biases and not any(
        name.endswith(".bias") and not re.fullmatch(layout.skipped, name) for name in plain
    )
    for ours, tensor, theirs, transposed in layout.rows(_unfilled(model, config, len(state))):
        if without_biases and ours.endswith(".bias"):
            rows.append(Row(ours, [], tensor.shape, False))
            continue
        found = [left.pop(part, None) for part in theirs]
        shape = (tensor.shape[0] // len(theirs), *tensor.shape[1:])
        shape = shape[::-1] if transposed else shape
        report.missing += [layout.prefix + part for part, name in zip(theirs, found, strict=True) if name is None]
        wrong = [name for name in found if name is not None and not _is_float(state[name], shape)]
        report.mis_shaped += [f"{name} {_kind(state[name])} instead of {shape}" for name in wrong]
        if not wrong and None not in found:
            rows.append(Row(ours, found, tensor.shape, transposed))
    report.untied = [left[a] for a, b in layout.tied.items() if a in left and not _same(state, left[a], plain.get(b))]
    report.unexpected = [
        name for plainly, name in left.items() if plainly not in layout.tied and not re.fullmatch(layout.skipped, plainly)
    ]
    return Fit(layout, config, rows, report)


def _unfilled(model: type[nn.Module], config, weights: int) -> nn.Module:
    """A model without memory, whose config is derived from the weights of a file."""
    if config.layers > weights:
        raise WeightsError(f"the config tells {config.layers} layers, but there are {weights} weights; one of both is wrong")
    try:
        return _without_memory(model, config)
    except (ValueError, RuntimeError) as error:  # sizes that don't fit each other, or beyond all memory
        raise WeightsError(f"the config can't be that of a {model.__name__}: {line(error)}") from None


class _Undrawn(TorchFunctionMode):
    """nn.init.normal_ draws nothing. For tensors without memory PyTorch would import its compiler to do so, in seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def _without_memory(model: type[nn.Module], *arguments) -> nn.Module:
    with torch.device("meta"), _Undrawn():
        return model(*arguments)


def _architectures(told: dict) -> list:
    found = told.get("architectures")
    return found if isinstance(found, list) else []


def _model_named(told: dict, beside: Path) -> type[nn.Module]:
    for model, layouts in LAYOUTS.items():
        if any(layout.architecture in _architectures(told) for layout in layouts):
            return model
    known = sorted({layout.architecture for layouts in LAYOUTS.values() for layout in layouts} - {""})
    raise WeightsError(
        f"{beside} must name one of {', '.join(known)} in architectures, but has {told.get('architectures')!r:.80}; give model="
    )


def _check(model: type[nn.Module]) -> None:
    if model not in LAYOUTS:
        raise WeightsError(
            f"model must be one of {', '.join(m.__name__ for m in LAYOUTS)}, but is {model!r}; unwrap it, if it is wrapped"
        )


def _layout(model: type[nn.Module], source: str) -> Layout:
    _check(model)
    layouts = {layout.source: layout for layout in LAYOUTS[model]}
    if source not in layouts:
        raise WeightsError(f"source must be one of {', '.join(layouts)} for {model.__name__}, but is {source!r}")
    return layouts[source]


def _plain_names(state: dict[str, Tensor], layout: Layout) -> dict[str, str]:
    """Names as the layout's table has them -> names in the file. The second name of one weight gets none of the table."""
    plain = {}
    for name in state:
        found = _plain(name, layout)
        plain[f"second {found}" if found in plain else found] = name
    if not any(name.startswith(layout.body) for name in plain):  # a file of the body alone
        plain = {layout.body + name: found for name, found in plain.items()}
    return plain


def _plain(name: str, layout: Layout) -> str:
    """A name of theirs without its prefix, and with the endings of today."""
    name = name.removeprefix(layout.prefix)
    for old, new in layout.old_endings.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _same(state: dict[str, Tensor], copy: str, original: str | None) -> bool:
    if original is None or state[copy].dtype != state[original].dtype:
        return False
    return torch.equal(state[copy], state[original])


def _is_float(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.is_floating_point() and tuple(tensor.shape) == shape


def _kind(tensor: Tensor) -> str:
    """The shape of a tensor, and its dtype where that can't be a weight's."""
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} {tensor.dtype}"


def _first(names: list[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
