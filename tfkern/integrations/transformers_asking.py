"""Hugging Face transformers: which models ask its AttentionInterface for attention, told by what their files hold."""

import sys
import weakref

from torch import nn

from tfkern import compat

_eager_only: "weakref.WeakKeyDictionary[type[nn.Module], bool]" = weakref.WeakKeyDictionary()


def asks(cls: type[nn.Module]) -> bool:
    """Whether a model's attention asks transformers' AttentionInterface: the module that its class is from has one, or else no
    attention of its own (a model made of other models, or a subclass: then its base tells)."""
    from transformers import AttentionInterface

    for base in cls.__mro__:
        values = vars(sys.modules.get(base.__module__, base)).values()
        if any(isinstance(x, AttentionInterface) for x in values):
            return True
        if any(_is_attention(x) and x.__module__ == base.__module__ for x in values):
            return False
    return True


def _is_attention(x) -> bool:
    return isinstance(x, type) and issubclass(x, nn.Module) and "attention" in x.__name__.lower()


def tables(cls: type[nn.Module]):
    """What a model's module has of tables {name of an attention implementation: class}, each with its own name."""
    for name, x in list(vars(sys.modules.get(cls.__module__, cls)).items()):
        if isinstance(x, dict) and x.keys() >= {"eager"} and all(map(_is_attention, x.values())):
            yield name, x


@compat.while_tracing
def eager_only(cls: type[nn.Module]) -> bool:
    """Whether the models in a module's file have no attention but eager, which doesn't know is_causal."""
    if cls not in _eager_only:
        _eager_only[cls] = _has_eager_only(cls)
    return _eager_only[cls]


def _has_eager_only(cls: type[nn.Module]) -> bool:
    from transformers import PreTrainedModel

    values = vars(sys.modules.get(cls.__module__, cls)).values()
    found = [x for x in values if isinstance(x, type) and issubclass(x, PreTrainedModel) and x.__module__ == cls.__module__]
    return bool(found) and not any(x._supports_sdpa for x in found)
