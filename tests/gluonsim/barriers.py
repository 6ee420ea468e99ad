"""mbarriers and named barriers, as the hardware counts them."""

from __future__ import annotations

from .errors import HazardKind, Report
from .history import History, Past


class MBarrier:
    """An mbarrier: a phase completes when its arrivals and its bytes have all come in.

    Waiting compares only the parity of the phase, as the hardware does, so a waiter that is two phases behind passes.
    """

    def __init__(self, count: int, label: str, report: Report):
        self.label = label
        self._count = count
        self._report = report
        self._pending_arrivals = count
        self._pending_bytes = 0
        self._completed_phases = 0
        self._arrived = Past()
        self._released = Past()

    def arrive(self, history: History, count: int = 1) -> None:
        if count > self._pending_arrivals:
            self._report(HazardKind.BARRIER, f"{count} arrivals, more than the phase still takes: {self}")
        self._pending_arrivals = max(0, self._pending_arrivals - count)
        history.release(self._arrived)
        self._complete_phase_if_due()

    def expect(self, history: History, nbytes: int) -> None:
        """Arrive once, and hold the phase open until that many more bytes have been delivered."""
        self._pending_bytes += nbytes
        self.arrive(history)

    def deliver(self, history: History, nbytes: int) -> None:
        """Count bytes written by a TMA load."""
        self._pending_bytes -= nbytes
        history.release(self._arrived)
        self._complete_phase_if_due()

    def has_completed(self, parity: int) -> bool:
        """Whether the latest phase of that parity is over; before the first phase, parity 1 counts as over."""
        return self._completed_phases % 2 != parity

    def acquire(self, history: History) -> None:
        history.join(self._released)

    @property
    def awaits_bytes(self) -> bool:
        return self._pending_bytes != 0

    def _complete_phase_if_due(self) -> None:
        if self._pending_arrivals == 0 and self._pending_bytes == 0:
            self._completed_phases += 1
            self._pending_arrivals = self._count
            self._released = Past(self._arrived)

    def __str__(self) -> str:
        return (
            f"mbarrier {self.label} in phase {self._completed_phases} "
            f"({self._pending_arrivals} of {self._count} arrivals and {self._pending_bytes} bytes pending)"
        )


class BarrierRound:
    """One use of a named barrier: from its first arrival until as many threads as it expects have arrived."""

    def __init__(self, expected: int):
        self.expected = expected
        self.complete = False
        self._threads_of: dict[str, int] = {}
        self._arrived = Past()

    @property
    def arrived_threads(self) -> int:
        return sum(self._threads_of.values())

    def has(self, partition: str) -> bool:
        return partition in self._threads_of

    def arrive(self, partition: str, threads: int, history: History) -> None:
        self._threads_of[partition] = self._threads_of.get(partition, 0) + threads
        history.release(self._arrived)
        self.complete = self.arrived_threads >= self.expected

    def acquire(self, history: History) -> None:
        history.join(self._arrived)


class NamedBarrier:
    """A hardware barrier of the ``bar.sync`` and ``bar.arrive`` instructions."""

    def __init__(self, index: int, report: Report):
        self._index = index
        self._report = report
        self._round: BarrierRound | None = None

    def arrive(self, partition: str, threads: int, expected: int, history: History) -> BarrierRound:
        """Add a partition's threads to the current round, and return that round."""
        barrier_round = self._round or BarrierRound(expected)
        if barrier_round.expected != expected:
            self._report(HazardKind.BARRIER, f"{self} joined with a thread count of {expected}")
        if barrier_round.has(partition):
            self._report(HazardKind.BARRIER, f"{partition} arrived twice in one round of {self}")
        barrier_round.arrive(partition, threads, history)
        if barrier_round.arrived_threads > expected:
            self._report(HazardKind.BARRIER, f"more threads arrived than expected: {self}")
        self._round = None if barrier_round.complete else barrier_round
        return barrier_round

    @property
    def has_arrivals(self) -> bool:
        return self._round is not None

    def __str__(self) -> str:
        arrived = f"{self._round.arrived_threads} of {self._round.expected} threads arrived" if self._round else "idle"
        return f"named barrier {self._index} ({arrived})"
