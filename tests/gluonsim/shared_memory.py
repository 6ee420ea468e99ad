"""Shared memory that knows what of it is defined and who accessed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from triton.experimental.gluon import language as gl

from .errors import HazardKind, UnsupportedError
from .history import Agent, History, Past
from .sites import kernel_site
from .tensor import Tensor, gluon_dtype, torch_dtype

Box = tuple[tuple[int, int], ...]
"""A range of indices along every dimension of an allocation."""


def _overlap(box: Box, other: Box) -> bool:
    return all(
        low < other_high and other_low < high for (low, high), (other_low, other_high) in zip(box, other, strict=False)
    )  # fmt: skip


@dataclass(frozen=True)
class Access:
    """An access to a box of shared memory: by whom, at which of its events, from where in the kernel."""

    box: Box
    agent: Agent
    event: int
    is_write: bool
    is_async: bool
    site: str

    def conflicts_with(self, other: Access) -> bool:
        return (self.is_write or other.is_write) and _overlap(self.box, other.box)

    def supersedes(self, prior: Access) -> bool:
        """Whether whatever races with the prior access, which is in this one's past, races with this one too."""
        covers = all(
            low <= prior_low and prior_high <= high
            for (low, high), (prior_low, prior_high) in zip(self.box, prior.box, strict=False)
        )
        return covers and (self.is_write or not prior.is_write)

    def crosses_proxy_after(self, prior: Access) -> bool:
        """Whether this access sees the prior one's effect only through a proxy fence."""
        return self.is_async and prior.is_write and not prior.is_async

    def __str__(self) -> str:
        return f"{'async ' if self.is_async else ''}{'write' if self.is_write else 'read'} at {self.site}"


class Machine(Protocol):
    """What memory needs of the machine it belongs to."""

    def report(self, kind: HazardKind, message: str, site: str) -> None: ...

    def begin_step(self) -> History:
        """Let other partitions go first; the history of the partition whose turn it then is again."""


class SharedAllocation:
    """The result of one ``allocate_shared_memory``."""

    def __init__(self, machine: Machine, dtype: gl.dtype, shape: Sequence[int], layout: Any, name: str):
        self.machine = machine
        self.layout = layout
        self.name = name
        self.data = torch.empty(tuple(shape), dtype=torch_dtype(dtype))
        self.undefined = torch.ones(tuple(shape), dtype=torch.bool)
        self._readings: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}  # by box and type: (data, undefined)
        self._accesses: list[Access] = []

    def reading(self, box: Box, dtype: gl.dtype, shape: tuple[int, ...], layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(data, what of it is undefined) of a box that is read and written as another type."""
        data = torch.empty(shape, dtype=torch_dtype(dtype))
        return self._readings.setdefault((box, dtype.name, shape, repr(layout)), (data, torch.ones(shape, dtype=torch.bool)))

    def spoil(self, box: Box, written: torch.Tensor) -> None:
        """A box was written of which `written` tells what is undefined: as another type, what it holds is undefined."""
        everything = (tuple((0, size) for size in self.data.shape), self.undefined)
        others = (
            [everything, *((key[0], undefined) for key, (_, undefined) in self._readings.items())] if self._readings else []
        )
        for other, undefined in others:
            if undefined.untyped_storage().data_ptr() == written.untyped_storage().data_ptr():
                continue
            if undefined is self.undefined:
                undefined[tuple(slice(low, high) for low, high in box)] = True
            elif _overlap(box, other):
                undefined.fill_(True)

    def record(self, access: Access, past: Past) -> None:
        """Check an access against all earlier ones, carried out or still in flight."""
        where = f"{self.name}{list(access.box)}"
        kept = []
        for prior in self._accesses:
            ordered = past.contains(prior.agent, prior.event)
            if access.conflicts_with(prior):
                if not ordered:
                    self.machine.report(HazardKind.RACE, f"{access} is unordered with {prior} on {where}", access.site)
                elif access.crosses_proxy_after(prior) and not past.contains_fenced(prior.agent, prior.event):
                    self.machine.report(HazardKind.PROXY, f"no fence_async_shared since {prior} on {where}", access.site)
            if not (ordered and access.supersedes(prior)):
                kept.append(prior)
        self._accesses = [*kept, access]


class SharedView:
    """A shared memory descriptor: a box of an allocation, perhaps transposed.

    ``index``, ``slice``, ``permute``, ``load`` and ``store`` are the methods kernels call.  For asynchronous accesses,
    ``record`` does the checks when they are issued, ``read`` and ``write`` do the work when they are performed.

    ``dims`` are the dimensions of the allocation that those of the view are; None where it is read as another type, so that
    every access to a part of it counts as one to all of the box.
    """

    def __init__(
        self,
        allocation: SharedAllocation,
        data: torch.Tensor,
        undefined: torch.Tensor,
        box: Box,
        dims: tuple[int, ...] | None,
    ):
        self._allocation = allocation
        self._data = data
        self._undefined = undefined
        self._box = box
        self._dims = dims

    @classmethod
    def whole(cls, allocation: SharedAllocation) -> SharedView:
        box = tuple((0, size) for size in allocation.data.shape)
        return cls(allocation, allocation.data, allocation.undefined, box, tuple(range(len(box))))

    @property
    def dtype(self) -> gl.dtype:
        return gluon_dtype(self._data.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._data.shape)

    @property
    def layout(self) -> Any:
        return self._allocation.layout

    @property
    def address(self) -> int:
        return self._data.data_ptr()

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    @property
    def label(self) -> str:
        return f"{self._allocation.name}[{self._box[0][0]}]"

    def index(self, index: Tensor | int) -> SharedView:
        row = self.slice(index, 1)
        return SharedView(self._allocation, row._data[0], row._undefined[0], row._box, row._dims and row._dims[1:])

    def slice(self, start: Tensor | int, length: int, dim: int = 0) -> SharedView:
        start = int(start)
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise IndexError(f"[{start}, {start + length}) is outside dimension {dim} of shape {self.shape}")
        box = list(self._box)
        if self._dims is not None:
            low = box[self._dims[dim]][0] + start
            box[self._dims[dim]] = (low, low + length)
        return SharedView(
            self._allocation,
            self._data.narrow(dim, start, length),
            self._undefined.narrow(dim, start, length),
            tuple(box),
            self._dims,
        )

    def permute(self, order: Sequence[int]) -> SharedView:
        return SharedView(
            self._allocation,
            self._data.permute(*order),
            self._undefined.permute(*order),
            self._box,
            self._dims and tuple(self._dims[dim] for dim in order),
        )

    def reshape(self, shape: Sequence[int]) -> SharedView:
        """Without the leading dimensions of size 1; nothing else is modelled."""
        dropped = len(self.shape) - len(shape)
        if dropped < 0 or self.shape != (1,) * dropped + tuple(shape):
            raise UnsupportedError(f"reshape of shared memory from {self.shape} to {tuple(shape)}")
        return SharedView(
            self._allocation, self._data.view(shape), self._undefined.view(shape), self._box, self._dims and self._dims[dropped:]
        )  # fmt: skip

    def reinterpret(self, dtype: gl.dtype, shape: Sequence[int], layout: Any) -> SharedView:
        """The memory as of another type, or in another layout: what is written as one is undefined as another."""
        shape = tuple(map(int, shape))
        data, undefined = self._allocation.reading(self._box, dtype, shape, layout)
        if self._dims is None or not self._data.is_contiguous() or data.nbytes > self.nbytes:
            raise UnsupportedError(
                f"{data.nbytes} bytes of shared memory seen as {dtype}{shape} in {self.nbytes} of {self.label}"
            )
        return SharedView(self._allocation, data, undefined, self._box, None)

    def load(self, layout: Any = None) -> Tensor:
        self.record(self._allocation.machine.begin_step(), kernel_site(), is_write=False, is_async=False)
        return Tensor(self.read(kernel_site()).clone())

    def store(self, value: Tensor) -> None:
        self.record(self._allocation.machine.begin_step(), kernel_site(), is_write=True, is_async=False)
        self.write(value.data)

    def record(self, history: History, site: str, *, is_write: bool, is_async: bool) -> None:
        access = Access(self._box, history.agent, history.event, is_write, is_async, site)
        self._allocation.record(access, history)

    def read(self, site: str) -> torch.Tensor:
        """The contents, with NaN where they are undefined."""
        if not self._undefined.any():
            return self._data
        self._allocation.machine.report(HazardKind.UNDEFINED, f"undefined elements of {self.label} are read", site)
        return self._data.masked_fill(self._undefined, float("nan") if self._data.is_floating_point() else 0)

    def write(self, values: torch.Tensor) -> None:
        if tuple(values.shape) != self.shape or values.dtype != self._data.dtype:
            raise ValueError(f"cannot write {values.dtype}{tuple(values.shape)} to {self._data.dtype}{self.shape}")
        self._data.copy_(values)
        self._undefined.fill_(False)
        self._allocation.spoil(self._box, self._undefined)

    def undefine(self) -> None:
        """Make the contents undefined."""
        self._undefined.fill_(True)
        self._allocation.spoil(self._box, self._undefined)
