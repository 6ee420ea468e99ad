"""The table of backends, and the choice between them.

A backend is a module of this folder and a line of BACKENDS. The module has

- `unsupported(problem, needs_grad) -> list[str]`: the reasons why it can't do the problem, with needs_grad its backward too;
  empty where it can;
- `forward(problem, tensors) -> (out, stats)`, stats as in problem.py;
- `backward(problem, tensors, out, stats, do, dlse, needed, into=None) -> Gradients`; dlse may be None, and so may a gradient
  that is not `needed` (a bool each); `into` are tensors for those of q, k and v;

and it may have

- `output(problem, tensors) -> out`, where out alone costs less than both results;
- `how(problem) -> str`, which of several ways it goes, for explain.

The backend that runs the forward runs the backward: what it has no backward for it does not support where one is needed.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from tfkern.backends import cpu, eager, hopper, portable
from tfkern.problem import Problem


class Backend(NamedTuple):
    """What computes attention. The last two are its place in the default order for tensors on a CPU, and for those on other
    devices; None: it runs only where it is asked for by name."""

    unsupported: Callable
    forward: Callable
    backward: Callable
    output: Callable | None = None
    how: Callable | None = None
    on_cpu: int | None = None
    elsewhere: int | None = None


def _backend(module: ModuleType, on_cpu: int | None, elsewhere: int | None) -> Backend:
    more = {name: getattr(module, name, None) for name in ("output", "how")}
    return Backend(module.unsupported, module.forward, module.backward, **more, on_cpu=on_cpu, elsewhere=elsewhere)


BACKENDS = {
    # By name only (backend="hopper", TFKERN_BACKENDS) until a GPU has shown that it is right, and faster.
    "hopper": _backend(hopper, on_cpu=None, elsewhere=None),
    # On a CPU the Triton kernels run only in the interpreter, which is there to test them, not for speed.
    "portable": _backend(portable, on_cpu=3, elsewhere=1),
    "cpu": _backend(cpu, on_cpu=1, elsewhere=None),
    "eager": _backend(eager, on_cpu=2, elsewhere=2),
}


def _order(where: str) -> tuple[str, ...]:
    places = {name: place for name, backend in BACKENDS.items() if (place := getattr(backend, where)) is not None}
    return tuple(sorted(places, key=places.get))


_ON_CPU, _ELSEWHERE = _order("on_cpu"), _order("elsewhere")


class UnsupportedError(RuntimeError):
    """No backend, or not the one asked for, can do the problem. The message gives each one's reasons."""


def order(device_type: str) -> tuple[str, ...]:
    """The names to try, first to last. TFKERN_BACKENDS (comma-separated) replaces the default."""
    if names := os.environ.get("TFKERN_BACKENDS"):
        chosen = tuple(name.strip() for name in names.split(","))
        if unknown := [name for name in chosen if name not in BACKENDS]:
            raise ValueError(f"TFKERN_BACKENDS names {unknown}; the backends are {list(BACKENDS)}")
        return chosen
    return _ON_CPU if device_type == "cpu" else _ELSEWHERE


def choose(problem: Problem, name: str | None = None, needs_grad: bool = False) -> Backend:
    """The backend for a problem: the one named, or the first in the order that supports it, and with needs_grad its backward.

    Raises UnsupportedError if there is none, ValueError if no backend has the name.
    """
    return BACKENDS[_choose(problem, known(name), order(problem.device.type), needs_grad)]


def known(name: str | None) -> str | None:
    """The name of a backend, or None; ValueError for others."""
    if name is not None and (not isinstance(name, str) or name not in BACKENDS):
        raise ValueError(f"backend must be None or one of {list(BACKENDS)}, but is {name!r}")
    return name


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, name: str | None, names: tuple[str, ...], needs_grad: bool) -> str:
    names = names if name is None else (name,)
    for candidate in names:
        if not BACKENDS[candidate].unsupported(problem, needs_grad):
            return candidate
    raise UnsupportedError("\n".join(["no backend can do this problem:", *_reasons(problem, names, needs_grad)]))


def explain(problem: Problem, name: str | None = None, needs_grad: bool = False) -> str:
    """The choice for a problem as text: the backend, the ones passed over with their reasons, and the problem itself."""
    try:
        chosen = _choose(problem, known(name), order(problem.device.type), needs_grad)
    except UnsupportedError as error:
        return str(error)
    names = (name,) if name else order(problem.device.type)
    way = f" ({how(problem)})" if (how := BACKENDS[chosen].how) else ""
    what = "forward and backward of " if needs_grad else ""
    return "\n".join([f"{chosen}{way} runs {what}{problem}", *_reasons(problem, names[: names.index(chosen)], needs_grad)])


def _reasons(problem: Problem, names, needs_grad: bool) -> list[str]:
    return [f"  {name}: {reason}" for name in names for reason in BACKENDS[name].unsupported(problem, needs_grad)]
