"""Global memory: TMA descriptors, and a check that CTAs do not store to the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from .tensor import gluon_dtype


class StoreOwners:
    """Which CTA has stored to each element of global memory during a launch.

    CTAs of a launch run in no particular order, so no element may be stored to by two of them, nor stored to by one
    and added to by another.
    """

    _ADDED_TO = -1

    def __init__(self):
        self._owners: dict[int, torch.Tensor] = {}

    def claim(self, tensor: torch.Tensor, index: Any, cta: int, *, adding: bool = False) -> bool:
        """Note that a CTA stores or adds to the elements ``tensor[index]``; whether it may."""
        owners = self._owners_of(tensor)
        claim = self._ADDED_TO if adding else cta
        found = owners[index]
        allowed = bool(((found == 0) | (found == claim) | (found == cta)).all())
        owners[index] = claim
        return allowed

    def _owners_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The owners of a tensor's elements, in its shape."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._owners:
            self._owners[storage.data_ptr()] = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=torch.int32)
        return self._owners[storage.data_ptr()].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class TensorDescriptor:
    """A TMA descriptor: a global tensor, accessed in blocks that may reach over its edges."""

    def __init__(self, tensor: torch.Tensor, block_shape: Sequence[int], layout: Any, padding: str = "zero"):
        self.layout = layout
        self.dtype = gluon_dtype(tensor.dtype)
        self.block_shape = list(block_shape)
        self.block_type = tl.block_type(self.dtype, self.block_shape)
        self.shape = list(tensor.shape)
        self.strides = list(tensor.stride())
        self.tensor = tensor
        self._padding = float("nan") if padding == "nan" else 0

    def read(self, corner: Sequence[int]) -> torch.Tensor:
        block = torch.full(self.block_shape, self._padding, dtype=self.tensor.dtype)
        outer, inner = self._overlap(corner)
        block[inner] = self.tensor[outer]
        return block

    def write(self, corner: Sequence[int], block: torch.Tensor, *, adding: bool = False) -> None:
        outer, inner = self._overlap(corner)
        target = self.tensor[outer]
        target.copy_(target + block[inner] if adding else block[inner])

    def region(self, corner: Sequence[int]) -> tuple[slice, ...]:
        """The part of the tensor that a block covers."""
        return self._overlap(corner)[0]

    def _overlap(self, corner: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a block inside the tensor, as indices into the tensor and into the block."""
        lows = [max(0, start) for start in corner]
        highs = [
            max(low, min(start + extent, size))
            for low, start, extent, size in zip(lows, corner, self.block_shape, self.shape, strict=False)
        ]
        outer = tuple(slice(low, high) for low, high in zip(lows, highs, strict=False))
        inner = tuple(slice(low - start, high - start) for low, high, start in zip(lows, highs, corner, strict=False))
        return outer, inner
