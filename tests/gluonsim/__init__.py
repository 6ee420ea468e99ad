"""A functional simulator of Gluon kernels for Hopper GPUs, to test their results and synchronisation on a CPU."""

from .errors import DeadlockError, Hazard, HazardError, HazardKind, SimulationError, UnsupportedError
from .simulation import SCHEDULES, Simulation, simulate

__all__ = [
    "SCHEDULES",
    "DeadlockError",
    "Hazard",
    "HazardError",
    "HazardKind",
    "Simulation",
    "SimulationError",
    "UnsupportedError",
    "simulate",
]
