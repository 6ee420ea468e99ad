"""The backends, their order, and the choice between them.

A backend has `unsupported(problem) -> list[str]` (the reasons why it can't do it; empty: it can),
`forward(problem, tensors) -> (out, stats)`, stats as in problem.py, and
`backward(problem, tensors, out, stats, do, dlse, needed, into=None) -> Gradients`; dlse may be None, and so may a gradient that
is not `needed` (a bool each); `into` are tensors for those of q, k and v.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

from tfkern.backends import cpu, eager, hopper, hopper_backward, portable
from tfkern.problem import Gradients, Problem


class Backend(NamedTuple):
    """What computes attention."""

    unsupported: Callable
    forward: Callable
    backward: Callable
    output: Callable | None = None  # (problem, tensors) -> out alone, if that costs less
    how: Callable | None = None  # of a problem: which of several ways it goes, in words
    recorded: bool = False  # whether it is an op of ops.py, which takes the packed qkv as it is, in the place of q


def _hopper_backward(problem: Problem, *arguments) -> Gradients:
    """By the kernels for Hopper what they can do."""
    backend = portable if hopper_backward.limits(problem) else hopper_backward
    return backend.backward(problem, *arguments)


BACKENDS = {
    # By name only (backend="hopper", TFKERN_BACKENDS) until a GPU has shown that it is right, and faster.
    "hopper": Backend(hopper.unsupported, hopper.forward, _hopper_backward),
    "portable": Backend(portable.unsupported, portable.forward, portable.backward),
    "cpu": Backend(cpu.unsupported, cpu.forward, cpu.backward, cpu.output, cpu.how),
    "eager": Backend(eager.unsupported, eager.forward, eager.backward),
}


class UnsupportedError(RuntimeError):
    """No backend, or not the one asked for, can do the problem. The message gives each one's reasons."""


def order(device_type: str) -> tuple[str, ...]:
    """The names to try, first to last. TFKERN_BACKENDS (comma-separated) replaces the default."""
    if names := os.environ.get("TFKERN_BACKENDS"):
        chosen = tuple(name.strip() for name in names.split(","))
        if unknown := [name for name in chosen if name not in BACKENDS]:
            raise ValueError(f"TFKERN_BACKENDS names {unknown}; the backends are {list(BACKENDS)}")
        return chosen
    # On a CPU the Triton kernels run only in the interpreter, which is there to test them, not for speed.
    return ("cpu", "eager", "portable") if device_type == "cpu" else ("portable", "eager")


def choose(problem: Problem, name: str | None = None) -> Backend:
    """The backend for a problem: the one named, or the first in the order that supports it; UnsupportedError if none."""
    return BACKENDS[_choose(problem, known(name), order(problem.device.type))]


def known(name: str | None) -> str | None:
    """The name of a backend, or None; ValueError for others."""
    if name is not None and (not isinstance(name, str) or name not in BACKENDS):
        raise ValueError(f"backend must be None or one of {list(BACKENDS)}, but is {name!r}")
    return name


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, name: str | None, names: tuple[str, ...]) -> str:
    names = names if name is None else (name,)
    for candidate in names:
        if not BACKENDS[candidate].unsupported(problem):
            return candidate
    raise UnsupportedError("\n".join(["no backend can do this problem:", *_reasons(problem, names)]))


def explain(problem: Problem, name: str | None = None) -> str:
    """The choice for a problem as text: the backend, the ones passed over with their reasons, and the problem itself."""
    try:
        chosen = _choose(problem, known(name), order(problem.device.type))
    except UnsupportedError as error:
        return str(error)
    names = (name,) if name else order(problem.device.type)
    way = f" ({how(problem)})" if (how := BACKENDS[chosen].how) else ""
    return "\n".join([f"{chosen}{way} runs {problem}", *_reasons(problem, names[: names.index(chosen)])])


def _reasons(problem: Problem, names) -> list[str]:
    return [f"  {name}: {reason}" for name in names for reason in BACKENDS[name].unsupported(problem)]
