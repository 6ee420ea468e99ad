"""One line that makes a process, a block or a model use tfkern, and one that undoes it."""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from tfkern.integrations import adapters, nanogpt, replay, served, timm, torch_modules, transformers_models  # noqa: F401  adapters

MARK = "_tfkern_adapter"  # in a changed module's __dict__: the name of its adapter; copies and pickles keep it

_NAMES = ("attention", "attn", "mhsa")  # in those of classes that attend, in small letters
_DROPOUTS = ("attn_drop", "attn_dropout")  # names of modules that see attention weights


@dataclass
class Report:
    """What one call did, by name: of the function, or of the modules in the model ("" is the model itself)."""

    changed: dict[str, str] = field(default_factory=dict)  # name: from what to what
    already: dict[str, str] = field(default_factory=dict)  # name: what it was made before
    unchanged: dict[str, str] = field(default_factory=dict)  # name: why not

    def __str__(self) -> str:
        parts = (("changed", self.changed), ("changed before", self.already), ("not changed", self.unchanged))
        lines = []
        for title, names in parts:
            if names:
                lines.append(f"{title} ({len(names)}):")
                lines += [f"  {name or '(the model)'}: {text}" for name, text in names.items()]
        return "\n".join(lines) or "nothing changed"


def patch(model: nn.Module | None = None) -> Report:
    """Make F.scaled_dot_product_attention tfkern's for the whole process, or change the attention layers of a model in place.

    Without a model, `torch.nn.functional.scaled_dot_product_attention` and every name outside torch that was imported from it
    lead to `tfkern.scaled_dot_product_attention`, in all threads, until `unpatch()`; a second call finds names imported since.
    What torch.compile has compiled is compiled anew. Out of reach: functions that were kept otherwise (in a closure, a default
    argument, a container), torch.jit.script, what PyTorch does in C++ itself, such as the inference of its encoder layers: on a
    GPU torch.nn.attention.activate_flash_attention_impl("tfkern") reaches those.

    With a model, modules that an adapter knows become tfkern's: torch.nn.MultiheadAttention, TransformerEncoderLayer and
    TransformerEncoder, not subclasses of them; models of transformers, which get attn_implementation="tfkern"; timm's
    Attention; nanoGPT's and minGPT's CausalSelfAttention. Parameters, buffers, hooks and names stay what they are, optimizers
    keep working, nothing is copied. A second call changes what is new. If an error comes in between, the model is as it was.
    (An nn.MultiheadAttention that is asked for its weights, which is its default, has PyTorch write them out.)

    Returns:
        A Report; print it. It also names modules that look like attention and were not changed, with the reason.

    Raises TypeError if model is no torch.nn.Module.
    """
    if model is None:
        names = served.serve(block=False)
        return Report(changed={name: "torch -> tfkern.scaled_dot_product_attention" for name in names})
    report, _ = _patch(model)
    return report


def unpatch(model: nn.Module | None = None) -> Report:
    """Undo `patch` of the process, or of a model or a copy of it, exactly. Open `patched` blocks keep theirs until they end.
    Without something to undo it does nothing. A module whose class something else has changed since stays as it is, and the
    report says what to do. Returns a Report; raises as patch."""
    if model is None:
        return Report(changed={name: "tfkern -> torch" for name in served.stop(block=False)})
    report = Report()
    for name, module in _modules(model):
        if adapter_name := vars(module).get(MARK):
            adapter = adapters.named(adapter_name)
            if reason := _revert(module, adapter):
                report.unchanged[name] = reason
            else:
                report.changed[name] = f"{adapter.becomes} -> {adapter.name}"
    return report


@contextlib.contextmanager
def patched(model: nn.Module | None = None) -> Iterator[Report]:
    """`patch` for a block, or as a decorator for a function: undone at its end, come what may. Blocks nest. Without a model
    the block is the whole process's: other threads (such as those of backward, where checkpointing recomputes) see it, too.
    It warns of a module that can't be undone because something else has changed its class within the block."""
    if model is not None:
        report, done = _patch(model)
        try:
            yield report
        finally:
            left = {n: _revert(m, adapter) for n, m, adapter in reversed(done) if vars(m).get(MARK) == adapter.name}
            for name, reason in left.items():
                if reason:
                    warnings.warn(f"tfkern.patched leaves {name or 'the model'}: {reason}", stacklevel=3)
        return
    names = served.serve(block=True)
    try:
        yield Report(changed={name: "torch -> tfkern.scaled_dot_product_attention" for name in names})
    finally:
        served.stop(block=True)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, or None for the process, but is {type(model).__name__}")
    return list(model.named_modules())


def _patch(model: nn.Module) -> tuple[Report, list[tuple[str, nn.Module, adapters.Adapter]]]:
    """The report, and what was changed by which adapter; all or nothing."""
    report, done = Report(), []
    try:
        for name, module in _modules(model):
            adapter = adapters.of(module)
            if standing := _standing(module):
                report.already[name] = standing.becomes
            elif adapter is None:
                if (reason := _why_not(module)) and not _within_changed(name, model):
                    report.unchanged[name] = reason
            elif reason := _past_its_class(module, adapter) or adapter.unsupported(module):
                report.unchanged[name] = reason
            else:
                done.append((name, module, adapter))
                _apply(module, adapter)
                report.changed[name] = f"{adapter.name} -> {adapter.becomes}"
    except BaseException:
        for _, module, adapter in reversed(done):
            _undo(module, adapter)
        raise
    return report, done


def _apply(module: nn.Module, adapter: adapters.Adapter) -> None:
    module.__dict__[MARK] = adapter.name
    adapter.apply(module)
    reference = weakref.ref(module)
    replay.note(module, functools.partial(_marked, reference), functools.partial(_as_then, reference, adapter))


def _undo(module: nn.Module, adapter: adapters.Adapter) -> None:
    adapter.revert(module)
    del module.__dict__[MARK]
    replay.forget(module)


def _revert(module: nn.Module, adapter: adapters.Adapter) -> str | None:
    """Undo a change, or tell why not: a class that was derived from ours since has what only it knows how to undo."""
    if adapter.ours in (None, type(module)):
        _undo(module, adapter)
        return None
    cls = adapters.full_name(type(module))
    if isinstance(module, adapter.ours):
        return (
            f"its class is {cls} by now, derived from {adapter.becomes}; undo what derived it (for parametrizations: "
            "torch.nn.utils.parametrize.remove_parametrizations), then unpatch again"
        )
    del module.__dict__[MARK]
    replay.forget(module)
    return f"its class is {cls} by now and no longer {adapter.becomes}: there is nothing to undo"


def _marked(reference: weakref.ref) -> bool:
    return MARK in vars(reference())


@contextlib.contextmanager
def _as_then(reference: weakref.ref, adapter: adapters.Adapter, patched: bool):
    """A replay of what was patched, or was not."""
    module = reference()
    if module is None or (MARK in vars(module)) == patched:
        yield
        return
    change, back = (_apply, _revert) if patched else (_revert, _apply)
    if reason := change(module, adapter):
        raise RuntimeError(f"a checkpoint can't be replayed by what its forward attended by: {reason}")
    try:
        yield
    finally:
        back(module, adapter)


def _standing(module: nn.Module) -> adapters.Adapter | None:
    """The adapter whose change is there, in classes derived since, too."""
    adapter = adapters.named(vars(module)[MARK]) if MARK in vars(module) else None
    return adapter if adapter and (adapter.ours is None or isinstance(module, adapter.ours)) else None


def _past_its_class(module: nn.Module, adapter: adapters.Adapter) -> str | None:
    if not adapter.forward or "forward" not in vars(module):
        return None
    return (
        "its forward is an attribute of the instance (accelerate's hooks make it one), which calls what the class was before; "
        "del module.forward, patch, and wrap it again"
    )


def _within_changed(name: str, model: nn.Module) -> bool:
    """Whether a module around this one was changed as a whole."""
    while name:
        name = name.rpartition(".")[0]
        if (standing := _standing(model.get_submodule(name))) and standing.whole:
            return True
    return False


def _why_not(module: nn.Module) -> str | None:
    """Why a module that looks like attention was left alone; None for those that don't."""
    cls = type(module)
    if cls.__module__.split(".")[0] == "tfkern":
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return f"{module.original_name} is compiled by torch.jit" if _attends(module, module.original_name) else None
    for base in cls.__mro__[1:]:
        if base in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder):
            return f"{adapters.full_name(cls)} is a subclass of {adapters.full_name(base)} and may differ from it"
    if _attends(module, cls.__name__):
        return (
            f"no adapter knows {adapters.full_name(cls)}; where it calls F.scaled_dot_product_attention, tfkern.patch() "
            "without a model serves it"
        )
    return None


def _attends(module: nn.Module, name: str) -> bool:
    children = dict(module.named_children())
    return any(part in name.lower() for part in _NAMES) or any(part in children for part in _DROPOUTS)
