"""What is known of modules that can be made to use tfkern. Each library's file registers its own."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Adapter:
    """How modules of one class are changed, in place, and changed back exactly."""

    name: str  # of the class, in full
    matches: Callable[[nn.Module], bool]
    unsupported: Callable[[nn.Module], str | None]  # why this one can't be changed
    apply: Callable[[nn.Module], None]
    revert: Callable[[nn.Module], None]
    becomes: str
    ours: type | None = None  # the class that modules get, if theirs changes
    forward: bool = True  # whether it is the forward of that class that attends
    whole: bool = False  # whether modules within, unless they have adapters of their own, are changed by it


_adapters: dict[str, Adapter] = {}


def register(adapter: Adapter) -> Adapter:
    """Let tfkern.patch(model) know it; one of the same name is replaced."""
    _adapters[adapter.name] = adapter
    return adapter


def named(name: str) -> Adapter:
    return _adapters[name]


def of(module: nn.Module) -> Adapter | None:
    """The last registered that matches."""
    return next((a for a in reversed(_adapters.values()) if a.matches(module)), None)


def by_class(theirs: type, ours: type, unsupported: Callable[[nn.Module], str | None] = lambda module: None) -> Adapter:
    """Where ours is a subclass that adds nothing to the state: the instance's class is all that changes. Instances of other
    subclasses of theirs do not match: what they have made of it is theirs to know.

    Whoever wraps a module's forward keeps a bound method of ours, and may call it after the class has changed back: a forward
    of ours hands instances of other classes on to `type(self).forward`.
    """
    return Adapter(
        name=full_name(theirs),
        matches=lambda module: type(module) is theirs,
        unsupported=unsupported,
        apply=lambda module: setattr(module, "__class__", ours),
        revert=lambda module: setattr(module, "__class__", theirs),
        becomes=full_name(ours),
        ours=ours,
        forward=ours.forward is not theirs.forward,
    )


def full_name(cls: type) -> str:
    """Module and name, without the modules that only hold the definition."""
    module = cls.__module__
    for public in ("torch.nn", "tfkern.nn"):
        if module.startswith(public + "."):
            module = public
    return f"{module}.{cls.__qualname__}"
