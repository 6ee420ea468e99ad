"""Launching Gluon kernels on the simulator."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HostTensorDescriptor

from .cta import Cta
from .errors import Hazard, HazardError, HazardKind
from .frontend import Frontend
from .global_memory import StoreOwners, TensorDescriptor
from .language import Language, MBarriers, Tma
from .scheduler import FixedSchedule, RandomSchedule, Schedule
from .tensor import Pointer, as_tensor

SCHEDULES: dict[str, Callable[[int | str], Schedule]] = {
    "eager": lambda seed: FixedSchedule(early=("load", "mma", "store")),
    "late-loads": lambda seed: FixedSchedule(early=("mma", "store")),
    "late-reads": lambda seed: FixedSchedule(early=("load",)),
    "lazy": lambda seed: FixedSchedule(),
    "random": RandomSchedule,
}
"""When asynchronous operations are performed: at once, as late as synchronisation allows, or at random."""


class Simulation:
    """Runs Gluon kernels on CPU tensors, one CTA after the other."""

    def __init__(
        self, schedule: str = "lazy", seed: int = 0, *, record_hazards: bool = False, builtins: Mapping[Any, str] | None = None
    ):
        """
        Args:
            schedule: One of ``SCHEDULES``.
            seed: Decides what a random schedule does.
            record_hazards: Collect hazards in ``hazards`` and go on, instead of raising at the first.
            builtins: Names the simulated builtins, as ``"tma.async_load"``, that ``@builtin`` functions defined
                outside of Triton stand for.
        """
        self._new_schedule = SCHEDULES[schedule]
        self._seed = seed
        self._record_hazards = record_hazards
        self._hazards: dict[Hazard, None] = {}
        self._cta: Cta | None = None
        namespaces = {
            "language": Language(self._current_cta),
            "tma": Tma(self._current_cta),
            "mbarrier": MBarriers(self._current_cta),
        }
        self._frontend = Frontend(namespaces, builtins or {})

    @property
    def hazards(self) -> Sequence[Hazard]:
        """The distinct hazards found so far."""
        return tuple(self._hazards)

    def launch(self, kernel: GluonJITFunction, grid: Sequence[int] | Callable, *args, num_warps: int = 4, **kwargs) -> None:
        """Run a kernel over a grid; like a launch on a GPU, but tensors are on the CPU."""
        options = kwargs.keys() - set(kernel.arg_names)
        bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k not in options})
        bound.apply_defaults()
        sizes = grid(bound.arguments) if callable(grid) else grid
        num_programs = (*map(int, sizes), 1, 1)[:3]
        constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        arguments = {
            name: self._frontend.translate(value) if name in constexprs else _device_argument(value)
            for name, value in bound.arguments.items()
        }
        program = partial(self._frontend.function(kernel), **arguments)
        store_owners = StoreOwners()
        for z, y, x in itertools.product(*map(range, reversed(num_programs))):
            schedule = self._new_schedule(f"{self._seed} {x} {y} {z}")
            self._cta = Cta((x, y, z), num_programs, schedule, store_owners, self._report)
            with torch.no_grad():
                self._cta.run(program, num_warps)

    def _current_cta(self) -> Cta:
        return self._cta

    def _report(self, kind: HazardKind, message: str, site: str) -> None:
        hazard = Hazard(kind, message, site)
        if not self._record_hazards:
            raise HazardError(hazard)
        self._hazards[hazard] = None


@contextmanager
def simulate(schedule: str = "lazy", seed: int = 0, **options) -> Iterator[Simulation]:
    """Run every Gluon kernel launched in this context, as ``kernel[grid](...)`` too, on a simulation.

    Takes the arguments of ``Simulation``.
    """
    simulation = Simulation(schedule, seed, **options)

    def run(kernel: GluonJITFunction, *args, grid, warmup, **kwargs) -> None:
        simulation.launch(kernel, grid, *args, **kwargs)

    with patch.object(GluonJITFunction, "run", run):
        yield simulation


def _device_argument(value: Any) -> Any:
    """What a kernel receives for a launch argument."""
    if isinstance(value, torch.Tensor):
        return Pointer.to_tensor(value)
    if isinstance(value, HostTensorDescriptor):
        tensor = value.base.as_strided(tuple(value.shape), tuple(value.strides))
        return TensorDescriptor(tensor, value.block_shape, value.layout, value.padding)
    if isinstance(value, tuple):
        parts = map(_device_argument, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, (bool, int, float)):
        return as_tensor(value)
    return value
