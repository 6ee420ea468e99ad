"""Keys and values that are kept, so that a new token attends to earlier ones without computing them again."""

import torch
from torch import Tensor


class KeyValueCache:
    """The keys and values of one attention layer, of all positions so far. For inference: it keeps no gradients.

    Memory for `room` positions is taken once, by the first call, in the shape, dtype and device of what comes.

    Args:
        room: the largest number of positions.
    """

    def __init__(self, room: int):
        self.room = room
        self.length = 0
        self._kept: list[Tensor] = []  # keys (B, Hkv, room, D) and values (B, Hkv, room, Dv), of which `length` are filled

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k (B, Hkv, n, D) and v (B, Hkv, n, Dv), n new positions.

        Returns: views of all positions so far, (B, Hkv, length, D) and (B, Hkv, length, Dv).

        Raises: ValueError if there is no room for them, if they don't fit those before, or if they need gradients.
        """
        start, end = self.length, self.length + k.shape[2]
        if end > self.room:
            raise ValueError(f"the cache has room for {self.room} positions, but {end} come; clear it, or make a larger one")
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            name = "k" if k.requires_grad else "v"
            raise ValueError(f"the cache keeps no gradients, but {name} needs one; call the model under torch.no_grad()")
        self._kept = self._kept or [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (k, v)]
        for name, kept, x in zip("kv", self._kept, (k, v), strict=True):
            wanted = (*kept.shape[:2], end - start, kept.shape[3])
            if tuple(x.shape) != wanted:
                raise ValueError(f"{name} must have the shape {wanted} to fit the cache, but has {tuple(x.shape)}")
            kept[:, :, start:end] = x
        self.length = end
        keys, values = (kept[:, :, :end] for kept in self._kept)
        return keys, values

    def clear(self) -> None:
        """Forget all positions; the memory stays."""
        self.length = 0


def positions_before(caches: list[KeyValueCache] | None, layers: int) -> int:
    """How many positions the caches of a model's layers have; 0 without caches. ValueError unless each layer has its own, and
    all have as many."""
    if caches is None:
        return 0
    lengths = [cache.length for cache in caches]
    if not len(set(caches)) == len(caches) == layers or len(set(lengths)) > 1:
        raise ValueError(
            f"cache must have a KeyValueCache of its own for each of {layers} blocks, all of one length, but has "
            f"{len(set(caches))}, of the lengths {lengths}; make new ones"
        )
    return lengths[0]
