"""Models of transformers, for tfkern.patch(model): they choose their attention by name. Imports no transformers."""

import sys

from torch import nn

from tfkern.integrations.adapters import Adapter, register

_WAS = "_tfkern_attn_implementation"  # in a changed model's __dict__: {path of a config: what it chose}


def _is_model(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # whoever has such a model has imported it
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def _unsupported(model) -> str | None:
    if model._can_set_attn_implementation():
        return None
    return f"the attention of {type(model).__name__} doesn't ask transformers' AttentionInterface, so nobody can change it"


def _configs(model):
    """Every config that a model's attention may ask, each with the path to it: of the models within it, which may have copies
    of their own, and of the configs within those."""
    for name, module in model.named_modules():
        if _is_model(module):
            yield from _within(module.config, name)


def _within(config, path: str):
    yield path, config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _within(getattr(config, name), f"{path}.config.{name}")


def _apply(model) -> None:
    from tfkern.integrations import transformers as integration

    name = integration.register()
    model.__dict__[_WAS] = {path: config._attn_implementation for path, config in _configs(model)}
    model.set_attn_implementation(name)


def _revert(model) -> None:
    from tfkern.integrations import transformers as integration

    was = model.__dict__.pop(_WAS)
    for path, config in _configs(model):
        # What was ours already was made so by its user, or by the patch of a model around this one, which will revert it.
        # What is no longer ours was chosen since.
        if was.get(path, integration.NAME) != integration.NAME and config._attn_implementation == integration.NAME:
            config._attn_implementation_internal = was[path]
    for module in model.modules():
        integration.unwatch(module)


register(
    Adapter(
        name="transformers.PreTrainedModel",
        matches=_is_model,
        unsupported=_unsupported,
        apply=_apply,
        revert=_revert,
        becomes='attn_implementation="tfkern"',
        forward=False,
        whole=True,
    )
)
