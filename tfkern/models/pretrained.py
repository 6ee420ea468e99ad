"""Reference models with weights from elsewhere: `from_pretrained` reads them, `save_pretrained` writes them.

What everything is called there is in the tables of tfkern/models/weights.py.
"""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from tfkern.extras import require
from tfkern.functional import attention as fused_attention
from tfkern.models.files import WeightsError, read, read_json, weights_file
from tfkern.models.weights import LAYOUTS, OLD_ENDINGS, Layout


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
            "of another shape": self.mis_shaped,
            "not a copy of the weight it is tied to": self.untied,
        }

    def __str__(self) -> str:
        return "\n".join(f"{what} ({len(names)}): {_first(names)}" for what, names in self.lists().items() if names)


def from_pretrained(
    path: str | Path, model: type[nn.Module] | None = None, *, attention: Callable[..., Tensor] = fused_attention, config=None,
    source: str | None = None, strict: bool = True, dtype: torch.dtype = torch.float32, **changes,
) -> nn.Module:  # fmt: skip
    """A reference model with the weights of a checkpoint, in training mode off.

    Args:
        path: a folder as transformers writes it (config.json with model.safetensors or pytorch_model.bin, or their shards), a
            file of weights with a config.json beside it, or nanoGPT's ckpt.pt.
        model: a class of LAYOUTS, such as tfkern.models.bert.MaskedLM; None takes the one that config.json names.
        attention: a function with the arguments of tfkern.attention.
        config: the model's config, in place of config.json.
        source: whose layout the file has, such as "timm"; None takes the one that fits best.
        strict: whether every weight must be there, nothing else, and all of the right shape. Else what does not fit keeps
            its first values, and a warning lists it.
        dtype: of the model's weights.
        changes: fields of the config that are to be other than in config.json, such as dropout=0.1.

    Raises: WeightsError for a file that can't be read, a config that asks for what the model does not compute, or weights
        that don't fit. Pickles are read without running code from them.
    """
    path = Path(path)
    file = weights_file(path)
    state, told = read(file)
    beside = file.parent / "config.json"
    if not told and config is None and beside.is_file():
        told = read_json(beside)
    model = model or _model_named(told, beside)
    layout, config = _fitting(model, state, told, config, source, beside, changes)
    ours, report = translated(model, config, layout, state)
    if report and strict:
        raise WeightsError(f"the weights of {file} don't fit {model.__name__} in the layout of {layout.source}:\n{report}")
    new = _built(model, config, attention)
    new.load_state_dict(ours, strict=False)
    if report:
        warnings.warn(f"of the weights of {file}, these are not used, or keep their first values:\n{report}", stacklevel=2)
    return new.to(dtype).eval()


def save_pretrained(model: nn.Module, folder: str | Path, source: str = "transformers") -> None:
    """Write model.safetensors and config.json by others' names. The folder is made if it isn't there.

    Raises: WeightsError for a model without such a layout; OSError where the disk refuses.
    """
    require("safetensors", "demo")
    from safetensors.torch import save_file

    layout, folder = _layout(type(model), source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in named(model, layout).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(told_config(model.config, layout), indent=2) + "\n", "utf-8")


def named(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The state dict of a model by others' names."""
    state = {}
    for _, tensor, theirs, transposed in layout.rows(model):
        parts = tensor.detach().chunk(len(theirs))
        state |= {layout.prefix + name: part.t() if transposed else part for name, part in zip(theirs, parts, strict=True)}
    return state


def translated(model: type[nn.Module], config, layout: Layout, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
    """A state dict of others by our names, as far as it fits, and what does not."""
    with torch.device("meta"):
        wanted = _built(model, config, fused_attention)
    left = {_plain(name, layout): name for name in state}
    report, ours = Report(), {}
    for name, tensor, theirs, transposed in layout.rows(wanted):
        found = [left.pop(part, None) for part in theirs]
        if None in found:
            report.missing += [part for part, name in zip(theirs, found, strict=True) if name is None]
            continue
        parts = [state[name].t() if transposed and state[name].dim() == 2 else state[name] for name in found]
        shape = (tensor.shape[0] // len(parts), *tensor.shape[1:])
        wrong = [(name, tuple(x.shape)) for name, x in zip(theirs, parts, strict=True) if tuple(x.shape) != shape]
        report.mis_shaped += [f"{name} {found} instead of {shape}" for name, found in wrong]
        if not wrong:
            ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    report.untied = [a for a, b in layout.tied.items() if a in left and not _same(state, left[a], b, layout)]
    report.unexpected = [name for name in left if name not in layout.tied and not re.fullmatch(layout.skipped, name)]
    return ours, report


def config_from(told: dict, layout: Layout, model: type[nn.Module], **changes):
    """The config of a model from what a config.json tells."""
    for key, allowed in layout.settings.items():
        if key in told and told[key] not in allowed:
            raise WeightsError(f"{key} must be {' or '.join(map(repr, allowed))} for {model.__name__}, but is {told[key]!r}")
    values = dict(layout.fixed)
    for name, (key, meanings) in layout.choices.items():
        if key in told and told[key] not in meanings:
            raise WeightsError(f"{key} must be {' or '.join(map(repr, meanings))} for {model.__name__}, but is {told[key]!r}")
        if key in told:
            values[name] = meanings[told[key]]
    told = {"num_labels": len(told.get("id2label") or (0, 0)), **told}
    defaults = {f.name: f.default for f in fields(model.config_class)}
    for name, key in layout.sizes.items():
        value = values[name] = told.get(key, defaults[name] if name in OPTIONAL else None)
        if not (value is None and defaults[name] is None) and type(value) is not type(defaults[name] or 0):
            raise WeightsError(f"the config must tell {key} for {model.__name__}, but it is {value!r}")
    return model.config_class(**{**values, **changes})


OPTIONAL = {"hidden", "eps", "segments", "channels"}  # fields that others' configs may leave out


def told_config(config, layout: Layout) -> dict:
    """What a config.json of the layout's source tells of a config."""
    told = {key: allowed[0] for key, allowed in layout.settings.items()}
    told["architectures"] = [layout.architecture]
    for name, (key, meanings) in layout.choices.items():
        told[key] = next(theirs for theirs, ours in meanings.items() if ours == getattr(config, name))
    told |= {key: getattr(config, name) for name, key in layout.sizes.items()}
    return told


def _model_named(told: dict, beside: Path) -> type[nn.Module]:
    architectures = told.get("architectures") or []
    for model, layouts in LAYOUTS.items():
        if any(layout.architecture in architectures for layout in layouts if layout.architecture):
            return model
    known = sorted({layout.architecture for layouts in LAYOUTS.values() for layout in layouts} - {""})
    raise WeightsError(
        f"{beside} must name one of {', '.join(known)} in architectures, but has {architectures}; name the class as model="
    )


def _layout(model: type[nn.Module], source: str) -> Layout:
    layouts = {layout.source: layout for layout in LAYOUTS.get(model, ())}
    if source not in layouts:
        raise WeightsError(f"source must be one of {', '.join(layouts) or 'none'} for {model.__name__}, but is {source!r}")
    return layouts[source]


def _fitting(model, state, told, config, source, beside, changes) -> tuple[Layout, object]:
    """Of a model's layouts the one with the fewest weights that don't fit, and the config by it."""
    if model not in LAYOUTS:
        raise WeightsError(f"model must be one of {', '.join(m.__name__ for m in LAYOUTS)}, but is {model!r}")
    if config is None and not told:
        raise WeightsError(f"there is no {beside} that tells the sizes of {model.__name__}; give them as config=")
    best, problem = None, None
    for layout in [_layout(model, source)] if source else LAYOUTS[model]:
        try:
            tried = config or config_from(told, layout, model, **changes)
        except WeightsError as error:
            problem = problem or error
            continue
        faults = sum(map(len, translated(model, tried, layout, state)[1].lists().values()))
        if best is None or faults < best[0]:
            best = faults, layout, tried
    if best is None:
        raise problem
    return best[1:]


def _built(model: type[nn.Module], config, attention: Callable[..., Tensor]) -> nn.Module:
    return model(config, attention)


def _plain(name: str, layout: Layout) -> str:
    """A name of theirs without its prefix, and with the endings of today."""
    name = name.removeprefix(layout.prefix)
    for old, new in OLD_ENDINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _same(state: dict[str, Tensor], copy: str, plain: str, layout: Layout) -> bool:
    original = next((tensor for name, tensor in state.items() if _plain(name, layout) == plain), None)
    return original is not None and torch.equal(state[copy], original)


def _first(names: list[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
