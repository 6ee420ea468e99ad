"""What the simulator can find wrong with a kernel."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class HazardKind(Enum):
    """The ways in which a kernel's synchronisation can be broken."""

    RACE = "race"
    """Two conflicting accesses that no synchronisation orders, whether or not this schedule made them collide."""
    PROXY = "proxy"
    """The async proxy (TMA, wgmma) touches a generic-proxy store that no fence_async_shared made visible."""
    UNDEFINED = "undefined"
    """Shared memory read before anything, or before the TMA load in flight, has written it."""
    ACCUMULATOR = "accumulator"
    """A wgmma result used before the warpgroup_mma_wait that retires it."""
    BARRIER = "barrier"
    """Arrivals that a barrier's count does not allow, or use of an mbarrier that was never initialised."""
    BOUNDS = "bounds"
    """Pointer access outside its tensor."""
    EXIT = "exit"
    """Asynchronous work or barrier arrivals still outstanding when the CTA ends."""


@dataclass(frozen=True)
class Hazard:
    """One finding, with the kernel line it was found at."""

    kind: HazardKind
    message: str
    site: str

    def __str__(self) -> str:
        return f"[{self.kind.value}] {self.message} (at {self.site})"


class Report(Protocol):
    """Where hazards are reported, with the kernel line being executed as their site unless another is given."""

    def __call__(self, kind: HazardKind, message: str, site: str | None = None) -> None: ...


class SimulationError(Exception):
    """The simulated kernel is wrong."""


class HazardError(SimulationError):
    """Raised at the first hazard, unless hazards are being recorded."""

    def __init__(self, hazard: Hazard):
        super().__init__(str(hazard))
        self.hazard = hazard


class DeadlockError(SimulationError):
    """No partition can run and nothing in flight can complete."""


class UnsupportedError(NotImplementedError):
    """The kernel uses a part of Gluon that the simulator does not model."""
