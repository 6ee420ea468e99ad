"""A CTA: its partitions, its memory and barriers, and the asynchronous work its partitions wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from .async_operations import Accumulator, AsyncOperation, TmaLoad, TmaStore, Wgmma
from .barriers import MBarrier, NamedBarrier
from .errors import HazardKind
from .global_memory import StoreOwners, TensorDescriptor
from .history import History
from .scheduler import Schedule, Scheduler, Task
from .shared_memory import SharedAllocation, SharedView
from .sites import assigned_name, kernel_site
from .tensor import Tensor

THREADS_PER_WARP = 32
NUM_NAMED_BARRIERS = 16


class Partition(Task):
    """The warps that execute one program, and the queues of asynchronous work that they wait on in order."""

    def __init__(self, body: Callable[[], None], name: str, num_warps: int, parent: Partition | None = None):
        super().__init__(body, name)
        self.num_warps = num_warps
        self.history = parent.history.fork(name) if parent else History(name)
        self.mmas: list[AsyncOperation] = []
        self.stores: list[AsyncOperation] = []

    @property
    def num_threads(self) -> int:
        return self.num_warps * THREADS_PER_WARP


class Cta:
    """One thread block, simulated from its start to its end."""

    def __init__(
        self,
        program_id: tuple[int, int, int],
        num_programs: tuple[int, int, int],
        schedule: Schedule,
        store_owners: StoreOwners,
        report: Callable[[HazardKind, str, str], None],
    ):
        self.program_id = program_id
        self.num_programs = num_programs
        self._scheduler = Scheduler(schedule)
        self._store_owners = store_owners
        self._report = report
        self._mbarriers: dict[int, MBarrier] = {}
        self._named_barriers: dict[int, NamedBarrier] = {}
        self._partitions: list[Partition] = []
        self._allocations: list[SharedAllocation] = []  # kept alive, so that addresses stay unique

    @property
    def current(self) -> Partition:
        """The partition that is executing."""
        return self._scheduler.current

    def report(self, kind: HazardKind, message: str, site: str | None = None) -> None:
        self._report(kind, message, site or kernel_site())

    def begin_step(self) -> History:
        self._scheduler.give_way()
        return self.current.history

    # ---- program structure

    def run(self, program: Callable[[], Any], num_warps: int) -> None:
        self._spawn(Partition(program, "default partition", num_warps))
        self._scheduler.run()
        self._check_exit()

    def specialize(self, default: Callable[[], Any], workers: Sequence[tuple[Callable[[], Any], int]]) -> Any:
        """Run the default program here and each worker in warps of its own, until all have ended."""
        parent = self.current
        partitions = [Partition(body, f"worker {index}", num_warps, parent) for index, (body, num_warps) in enumerate(workers)]
        for partition in partitions:
            self._spawn(partition)
        result = default()
        self._scheduler.block(lambda: all(partition.finished for partition in partitions), lambda: "the workers to end")
        for partition in partitions:
            parent.history.join(partition.history)
        return result

    def _spawn(self, partition: Partition) -> None:
        self._partitions.append(partition)
        self._scheduler.spawn(partition)

    def _check_exit(self) -> None:
        site = "the end of the kernel"
        unawaited = [operation for operation in self._scheduler.in_flight if isinstance(operation, TmaLoad)]
        for partition in self._partitions:
            unawaited += [*partition.mmas, *partition.stores]
        for operation in unawaited:
            self.report(HazardKind.EXIT, f"nothing has waited for the {operation}", site)
        for barrier in self._mbarriers.values():
            if barrier.awaits_bytes:
                self.report(HazardKind.EXIT, f"bytes are unaccounted for: {barrier}", site)
        for barrier in self._named_barriers.values():
            if barrier.has_arrivals:
                self.report(HazardKind.EXIT, f"arrivals are left over: {barrier}", site)
        self._scheduler.perform_all()

    # ---- global memory

    def claim_global(self, tensor: torch.Tensor, index: Any, *, adding: bool = False) -> None:
        """Check that no other CTA has stored where this one is about to."""
        x, y, z = self.program_id
        size_x, size_y, _ = self.num_programs
        if not self._store_owners.claim(tensor, index, 1 + x + size_x * (y + size_y * z), adding=adding):
            self.report(HazardKind.RACE, "another CTA has stored to the same global memory")

    # ---- shared memory and barriers

    def allocate(self, dtype: gl.dtype, shape: Sequence[int], layout: Any) -> SharedView:
        allocation = SharedAllocation(self, dtype, shape, layout, assigned_name("shared memory"))
        self._allocations.append(allocation)
        return SharedView.whole(allocation)

    def init_mbarrier(self, view: SharedView, count: int) -> None:
        self._mbarriers[view.address] = MBarrier(count, view.label, self.report)

    def invalidate_mbarrier(self, view: SharedView) -> None:
        del self._mbarriers[view.address]

    def mbarrier(self, view: SharedView) -> MBarrier:
        barrier = self._mbarriers.get(view.address)
        if barrier is None:
            self.report(HazardKind.BARRIER, f"mbarrier {view.label} was never initialised")
            barrier = self._mbarriers[view.address] = MBarrier(1, view.label, self.report)
        return barrier

    def wait_mbarrier(self, barrier: MBarrier, parity: int) -> None:
        self._scheduler.block(
            lambda: barrier.has_completed(parity),
            lambda: f"parity {parity} of {barrier}",
            lambda operation: isinstance(operation, TmaLoad) and operation.barrier is barrier,
        )
        barrier.acquire(self.current.history)

    def arrive_named(self, index: int, threads: int, *, wait: bool) -> None:
        if not 1 + len(self._partitions) <= index < NUM_NAMED_BARRIERS:
            self.report(HazardKind.BARRIER, f"named barrier {index} is one that Triton uses itself, or does not exist")
        partition = self.current
        barrier = self._named_barriers.setdefault(index, NamedBarrier(index, self.report))
        barrier_round = barrier.arrive(partition.name, partition.num_threads, threads, partition.history)
        if wait:
            self._scheduler.block(lambda: barrier_round.complete, lambda: str(barrier))
            barrier_round.acquire(partition.history)

    # ---- asynchronous operations

    def load_async(self, source: TensorDescriptor, corner: Sequence[int], barrier: MBarrier, destination: SharedView) -> None:
        self._scheduler.issue(TmaLoad(self.current.history, source, corner, barrier, destination))

    def store_async(self, source: SharedView, target: TensorDescriptor, corner: Sequence[int], *, adding: bool) -> None:
        self.claim_global(target.tensor, target.region(corner), adding=adding)
        store = TmaStore(self.current.history, source, target, corner, adding)
        self.current.stores.append(store)
        self._scheduler.issue(store)

    def mma_async(self, left: SharedView | Tensor, right: SharedView, addend: Tensor | None) -> Accumulator:
        mma = Wgmma(self.current.history, left, right, addend)
        self.current.mmas.append(mma)
        self._scheduler.issue(mma)
        return Accumulator(mma, self.report)

    def retire_mmas(self, num_outstanding: int) -> None:
        self._retire(self.current.mmas, num_outstanding)

    def retired_value(self, value: Tensor) -> Tensor:
        """What a wgmma wait makes of a tensor passed through it: a plain tensor, if its wgmma is retired."""
        if not isinstance(value, Accumulator) or value.operation in self.current.mmas:
            return value
        return Tensor(value.operation.result)

    def retire_stores(self, num_outstanding: int) -> None:
        self._retire(self.current.stores, num_outstanding)

    def _retire(self, queue: list[AsyncOperation], num_outstanding: int) -> None:
        """Wait until at most that many of the partition's operations, the latest, are outstanding."""
        retired = queue[: max(0, len(queue) - num_outstanding)]
        self._scheduler.block(
            lambda: all(operation.done for operation in retired), lambda: ", ".join(map(str, retired)), retired.__contains__
        )
        for operation in retired:
            self.current.history.join(operation.history)
        del queue[: len(retired)]
