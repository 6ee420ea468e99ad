"""One call of attention: Problem describes it without its tensors, Tensors are its tensors. The checks are in checks.py.

The forward saves `stats` (B, H, 2, Nq) for the backward, in the dtype of lse. For each row of queries they hold m and
log l = log(sum of exp(logit - unit * m)). m is usually the largest logit. It is in units of q . k if a logit is the scaled
product alone (`unit` is the scale then, else 1). From m and log l the backward forms the same weights as the forward; from
lse = unit * m + log l it could not, because beside an m of 1e9 log l is rounded away. m may be any number. A row that sees no
key has m = 0 and log l = -inf.

With precise_delta stats have more rows, (B, H, stats_rows, Nq). Those behind each head's first two hold what O lost when it was
rounded to 16 bits, as (Nq, Dv) in the dtype of O (kernels/rounding.py).
"""

import functools
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of one call, as backends take them. The fields that Gradients has too are differentiable."""

    q: Tensor  # (B, H, Nq, D); packed sequences: (1, H, total_q, D)
    k: Tensor  # (B, Hkv, Nk, D)
    v: Tensor  # (B, Hkv, Nk, Dv)
    bias: Tensor | None = None  # (B, H, Nq, Nk), float32 or the dtype of q; a dim that broadcasts is 1
    slopes: Tensor | None = None  # (B, H) or (1, H)
    sinks: Tensor | None = None  # (H,) contiguous
    mask: Tensor | None = None  # bool, shape as bias
    key_lengths: Tensor | None = None  # (B,) contiguous
    cu_q: Tensor | None = None  # (B + 1,) contiguous
    cu_k: Tensor | None = None  # (B + 1,) contiguous
    seed: Tensor | None = None  # (2,) int64, of dropout
    scale: Tensor | None = None  # (), in the dtype of lse; None: Problem.scale is the number


class Gradients(NamedTuple):
    """The gradients of the differentiable tensors; None: not needed."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_of(stats: Tensor, unit) -> Tensor:
    """lse (B, H, Nq). Its gradient flows through log l only; m counts as a constant."""
    m, log_l = stats.select(2, 0), stats.select(2, 1)
    return log_l + m.detach() * unit


def stats_rows(dtype: torch.dtype, v_head_dim: int, precise_delta: bool) -> int:
    """The number of rows of stats: 2, and those for the rounding of O, which only 16-bit dtypes have."""
    return 2 + (v_head_dim + 1) // 2 if precise_delta and dtype.itemsize == 2 else 2


def stats_of(lse: Tensor, stats_rows: int = 2) -> Tensor:
    """stats from lse alone: m = 0, log l = lse."""
    batch, heads, rows = lse.shape
    stats = lse.new_zeros(batch, heads, stats_rows, rows)
    stats.select(2, 1).copy_(lse)
    return stats


@dataclass(frozen=True)
class Problem:
    """One call of attention, without its tensors.

    Query i sees key j if i + shift - left <= j <= i + shift + right, j is less than the number of keys, and no mask hides it.
    shift is 0, with lower_right the number of keys - the number of queries. With key lengths, the number of keys is that of the
    batch. With packed, n_q and n_k are the rows of all `batch` sequences together.
    """

    batch: int
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float | None = None  # None: it is Tensors.scale
    left: int | None = None  # None: unbounded
    right: int | None = None
    lower_right: bool = False
    packed: bool = False
    has_key_lengths: bool = False
    mask: tuple[int, ...] | None = None  # the shape of the boolean mask; a dim that broadcasts is 1
    bias: tuple[int, ...] | None = None  # the shape of the additive mask
    dropout_p: float = 0.0
    softcap: float | None = None
    has_slopes: bool = False
    has_sinks: bool = False
    score_mod: tuple | None = None
    precise_delta: bool = False
    plans: dict = field(default_factory=dict, compare=False, repr=False)  # memo of the backends

    def __post_init__(self):
        values = [getattr(self, f.name) for f in fields(self) if f.compare]
        object.__setattr__(self, "_hash", hash(tuple(values)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def group(self) -> int:
        """The number of query heads that share a key head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def lse_dtype(self) -> torch.dtype:
        return lse_dtype(self.dtype)

    @property
    def stats_rows(self) -> int:
        return stats_rows(self.dtype, self.v_head_dim, self.precise_delta)

    @property
    def heavy(self) -> bool:
        """Whether the kernels do more for each score than scale it and apply the band."""
        return bool(self.mask or self.bias or self.dropout_p or self.softcap or self.has_slopes or self.score_mod)

    @property
    def several(self) -> bool:
        """Whether at least two of dropout, softcap, ALiBi and score_mod are there, which together take many registers."""
        return sum(map(bool, (self.dropout_p, self.softcap, self.has_slopes, self.score_mod))) > 1

    @property
    def linear(self) -> bool:
        """Whether a logit is the scaled product of query and key alone, and no sink is there."""
        return not (self.bias or self.softcap or self.has_slopes or self.has_sinks or self.score_mod)

    def unit(self, t: Tensors):
        """The factor that makes a logit of m of the stats."""
        if not self.linear:
            return 1.0
        return t.scale if self.scale is None else self.scale

    @functools.cached_property
    def plain(self) -> bool:
        """Whether q, k and v are the only tensors and a logit is scale * q . k within a band."""
        return not (self.heavy or self.packed or self.has_key_lengths or self.has_sinks or self.scale is None)
