"""Reentrant checkpoints replay a forward in the backward, which may come after a block of `patched` or an `unpatch`. The replay
attends by what the forward attended by: with dropout, the two have other random bits.

While something is patched, torch.utils.checkpoint.CheckpointFunction notes what is, and replays with the same. (The form that
is not reentrant compares what it saved, and raises.)
"""

import contextlib
import functools
import weakref
from collections.abc import Callable

from tfkern import compat

_noted = weakref.WeakKeyDictionary()  # what may be patched: whether it is, and a function of whether it was, for that context
_originals: dict[str, staticmethod] = {}


def note(patched: object, now: Callable[[], bool], way: Callable) -> None:
    """Until `forget`, replays find it as their forwards did: within way(True) where now() was true then, else way(False)."""
    if patched not in _noted:  # first, to be called when the dictionary has lost it
        weakref.finalize(patched, _restore_if_unused).atexit = False
    _noted[patched] = now, way
    if not _originals and compat.CheckpointFunction is not None:
        for name, wrapper in (("forward", _forward), ("backward", _backward)):
            _originals[name] = vars(compat.CheckpointFunction)[name]
            setattr(compat.CheckpointFunction, name, staticmethod(functools.wraps(_originals[name])(wrapper)))


def forget(patched: object) -> None:
    """It is not patched any longer."""
    _noted.pop(patched, None)
    _restore_if_unused()


def _restore_if_unused() -> None:
    """With the last that was patched, also if it died so, PyTorch's class is what it was."""
    if not _noted:
        for name, original in _originals.items():
            setattr(compat.CheckpointFunction, name, original)
        _originals.clear()


class _Replayable:
    """A checkpointed function and what was patched when it ran."""

    def __init__(self, function: Callable, before: bool = False):
        """before: it ran when nothing was."""
        self.function = function
        self.ways = {} if before else {patched: way for patched, (now, way) in _noted.items() if now()}

    def __call__(self, *args):
        ways = {patched: way for patched, (_, way) in _noted.items()} | self.ways
        with contextlib.ExitStack() as stack:
            for patched, way in ways.items():
                stack.enter_context(way(patched in self.ways))
            return self.function(*args)


def _forward(ctx, run_function, *args):
    return _originals["forward"].__func__(ctx, _Replayable(run_function), *args)


def _backward(ctx, *grads):
    if not isinstance(ctx.run_function, _Replayable):
        ctx.run_function = _Replayable(ctx.run_function, before=True)
    return _originals["backward"].__func__(ctx, *grads)
