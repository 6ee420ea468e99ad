"""The band of a dense problem on the host: which keys each row of queries sees, for slices of rows and of keys."""

import torch
from torch import Tensor

from tfkern.problem import Problem


def shift_of(p: Problem) -> int:
    """Query i stands at key i + shift."""
    return p.n_k - p.n_q if p.lower_right else 0


def alive(p: Problem) -> slice:
    """The rows that see at least one key, which are contiguous."""
    shift = shift_of(p)
    first = 0 if p.right is None else max(0, -shift - p.right)
    stop = p.n_q if p.left is None else min(p.n_q, p.n_k - shift + p.left)
    return slice(first, stop) if p.n_k and stop > first else slice(0, 0)


def keys_of(p: Problem, rows: slice) -> slice:
    """The keys from the first to the last that one of the rows sees."""
    shift = shift_of(p)
    lo = 0 if p.left is None else min(max(rows.start + shift - p.left, 0), p.n_k)
    hi = p.n_k if p.right is None else max(min(rows.stop + shift + p.right, p.n_k), lo)
    return slice(lo, hi)


def seen(p: Problem, rows: int) -> float:
    """The average number of keys that `rows` neighbouring queries see together."""
    if p.left is None and p.right is None:
        return p.n_k
    if p.left is None or p.right is None:
        return (p.n_k + rows) / 2
    return min(p.n_k, rows + p.left + p.right)


def step(p: Problem, costs: dict[int, float]) -> int:
    """The number of rows of a tile for which all scores cost least. `costs`: the cost of a score by number of rows."""
    return min(costs, key=lambda rows: costs[rows] * seen(p, rows))


def places(p: Problem, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    """i + shift (rows, 1) and j (keys,). Their difference is the signed distance."""
    i = torch.arange(rows.start, rows.stop, device=p.device)[:, None] + shift_of(p)
    return i, torch.arange(keys.start, keys.stop, device=p.device)


def hidden(p: Problem, rows: slice, keys: slice) -> Tensor:
    """(1, 1, rows, keys) bool: True where the band hides a key from a row."""
    i, j = places(p, rows, keys)
    return beyond(i - j, p.left, p.right)[None, None]


def beyond(distance: Tensor, left: int | None, right: int | None) -> Tensor:
    """True where the distance i - j is outside of a band, in the shape of `distance`."""
    found = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        found |= distance > left
    if right is not None:
        found |= distance < -right
    return found


def of_tile(x: Tensor, rows: slice, keys: slice) -> Tensor:
    """The part of a mask or bias (B or 1, H or 1, Nq or 1, Nk or 1) for rows and keys."""
    if x.shape[2] > 1:
        x = x[:, :, rows]
    return x[..., keys] if x.shape[3] > 1 else x
