"""What the asynchronous units of a Hopper SM do: TMA loads and stores, and wgmma."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .barriers import MBarrier
from .errors import HazardKind, Report
from .global_memory import TensorDescriptor
from .history import Agent, History
from .shared_memory import SharedView
from .sites import kernel_site
from .tensor import Tensor

_load_numbers = itertools.count()


class AsyncOperation:
    """Work of the async proxy: checked when issued, performed when the schedule says so."""

    kind: str
    """``"load"``, ``"mma"`` or ``"store"``."""

    def __init__(self, issuer: History, agent: Agent):
        self.site = kernel_site()
        self.history = issuer.fork(agent)
        self.done = False

    @property
    def performable(self) -> bool:
        return True

    def perform(self) -> None:
        self._execute()
        self.done = True

    def _execute(self) -> None:
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.kind} issued at {self.site}"


class TmaLoad(AsyncOperation):
    """Global to shared memory; the destination is undefined until the bytes are counted on the mbarrier."""

    kind = "load"

    def __init__(
        self, issuer: History, source: TensorDescriptor, corner: Sequence[int], barrier: MBarrier, destination: SharedView
    ):
        super().__init__(issuer, ("load", next(_load_numbers)))
        self._source = source
        self._corner = corner
        self.barrier = barrier
        self._destination = destination
        destination.record(self.history, self.site, is_write=True, is_async=True)
        destination.undefine()

    def _execute(self) -> None:
        self._destination.write(self._source.read(self._corner))
        self.barrier.deliver(self.history, self._destination.nbytes)


class TmaStore(AsyncOperation):
    """Shared to global memory, replacing what is there or adding to it; the issuer can wait for it."""

    kind = "store"

    def __init__(self, issuer: History, source: SharedView, target: TensorDescriptor, corner: Sequence[int], adding: bool):
        super().__init__(issuer, ("store", issuer.agent))
        self._source = source
        self._target = target
        self._corner = corner
        self._adding = adding
        source.record(self.history, self.site, is_write=False, is_async=True)

    def _execute(self) -> None:
        self._target.write(self._corner, self._source.read(self.site), adding=self._adding)


class Wgmma(AsyncOperation):
    """A matrix product of shared memory, or registers and shared memory, accumulated in registers in float32."""

    kind = "mma"

    def __init__(self, issuer: History, left: SharedView | Tensor, right: SharedView, addend: Tensor | None):
        super().__init__(issuer, ("mma", issuer.agent))
        self.shape = (left.shape[0], right.shape[1])
        self.result: torch.Tensor | None = None
        self._left = left if isinstance(left, SharedView) else left.data
        self._right = right
        self._addend = addend
        for operand in (left, right):
            if isinstance(operand, SharedView):
                operand.record(self.history, self.site, is_write=False, is_async=True)

    @property
    def performable(self) -> bool:
        return not isinstance(self._addend, Accumulator) or self._addend.operation.done

    def _execute(self) -> None:
        left = self._left.read(self.site) if isinstance(self._left, SharedView) else self._left
        product = (left.double() @ self._right.read(self.site).double()).float()  # as interpreter.py says
        if isinstance(self._addend, Accumulator):
            product += self._addend.operation.result
        elif self._addend is not None:
            product += self._addend.data
        self.result = product


class Accumulator(Tensor):
    """The result of an asynchronous wgmma, not yet retired: only another wgmma or a wait may take it."""

    def __init__(self, operation: Wgmma, report: Report):
        super().__init__(torch.full(operation.shape, float("nan")))
        self.operation = operation
        self._report = report

    @property
    def data(self) -> torch.Tensor:
        self._report(HazardKind.ACCUMULATOR, f"the result of the {self.operation} is used before it is retired")
        return self._data
