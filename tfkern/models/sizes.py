"""Sizes and settings of the reference models: tfkern's configs from the config.json of other libraries, and back."""

import math
from dataclasses import fields, replace

from torch import nn

from tfkern.models.files import WeightsError
from tfkern.models.weights import Layout


def config_from(told: dict, layout: Layout, model: type[nn.Module], **changes):
    """The config of a model from the contents of a config.json. WeightsError for a missing field, or one that asks for what the
    model does not compute."""
    told = {**layout.defaults, "num_labels": _count(told.get("id2label")), **told, **_rotary(told)}
    values = dict(layout.fixed)
    for key, allowed in layout.settings.items():
        if key in told and told[key] not in allowed:
            raise WeightsError(f"{key} must be {' or '.join(map(repr, allowed))} for {model.__name__}, but is {told[key]!r}")
    for name, (key, meanings) in layout.choices.items():
        if key in told and told[key] not in list(meanings):
            raise WeightsError(f"{key} must be {' or '.join(map(repr, meanings))} for {model.__name__}, but is {told[key]!r}")
        if key in told:
            values[name] = meanings[told[key]]
    defaults = {f.name: f.default for f in fields(model.config_class)}
    for name, key in layout.sizes.items():
        value, default = told.get(key), defaults[name]
        if wanted := _wanted(value, default, least=0 if name == "classes" else 1):
            raise WeightsError(
                f"the config must tell {key}, {wanted}, for {model.__name__}, but it is {value!r:.80}; or give config="
            )
        values[name] = float(value) if type(default) is float else value
    return _usual(model.config_class(**{**values, **changes}))


def _wanted(value: object, default: object, least: int) -> str | None:
    """What a value must be instead, if it isn't of the kind of our default: a switch, a count from `least` on, or a float."""
    kind = int if default is None else type(default)
    if kind is bool:
        return None if type(value) is bool else "true or false"
    if kind is float:
        return None if type(value) in (int, float) and 0 <= value < math.inf else "a number of 0 or more"
    if value is None and default is None:
        return None
    return None if type(value) is int and least <= value < 2**31 else f"a whole number from {least} to 2^31"


def _count(labels: object) -> int:
    """The number of classes by their table; without one transformers means 2."""
    return len(labels) if isinstance(labels, dict) else 2


def _rotary(told: dict) -> dict:
    """The settings of the rotary angles in a config. transformers 5 has them in a table, in which `type` is an older name."""
    table = told.get("rope_parameters")
    if not isinstance(table, dict):
        return {}
    return {"rope_type": table["type"], **table} if "type" in table else table


def _usual(config):
    """The config with hidden=None for 4 * width, where None means that."""
    if getattr(type(config), "hidden", 0) is None and config.hidden == 4 * config.width:
        return replace(config, hidden=None)
    return config


def told_config(config, layout: Layout) -> dict:
    """The contents of a config.json of the layout's source for a config. WeightsError if it can't express the config."""
    config = _usual(config)
    for name, value in layout.fixed.items():
        if getattr(config, name) != value:
            raise WeightsError(
                f"{name} must be {value!r} in the layout of {layout.source}, but is {getattr(config, name)!r}; choose another"
            )
    told = {key: allowed[0] for key, allowed in layout.settings.items()}
    if layout.architecture:
        told["architectures"] = [layout.architecture]
    for name, (key, meanings) in layout.choices.items():
        told[key] = next(theirs for theirs, ours in meanings.items() if ours == getattr(config, name))
    told |= {key: getattr(config, name) for name, key in layout.sizes.items()}
    if (key := layout.sizes.get("hidden")) and told[key] is None:  # most of others' configs must tell it
        told[key] = 4 * config.width
    return told
