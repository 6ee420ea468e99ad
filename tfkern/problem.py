"""What is to be computed, without the tensors (Problem), and the tensors (Tensors). The checks are in checks.py.

What a forward leaves of each row for its backward are `stats` (B, H, 2, Nq), in the dtype of lse: m, and log l = log(sum of
exp(logit - unit * m)). With m the largest logit, in units of q . k where that is all of it (`unit` is the scale then, else 1),
the backward can form weights as the forward did: in lse = unit * m + log l the second is lost beside a first of 1e9. m may be
another number, 0 where a row sees no key, and log l is -inf there. With precise_delta stats have more rows (B, H, stats_rows,
Nq), for what O lost when it was rounded to 16 bits: (Nq, Dv) in the dtype of O behind each head's two (kernels/rounding.py).
"""

import functools
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of one call, as every backend gets them. The first six are differentiable; all but three may be None."""

    q: Tensor  # (B, H, Nq, D); packed sequences lie behind each other in one batch, (1, H, total, D)
    k: Tensor  # (B, Hkv, Nk, D)
    v: Tensor  # (B, Hkv, Nk, Dv)
    bias: Tensor | None = None  # (B, H, Nq, Nk), float32 or the dtype of q, each dim its size or 1
    slopes: Tensor | None = None  # (B, H) or (1, H)
    sinks: Tensor | None = None  # (H,) contiguous
    mask: Tensor | None = None  # as bias, bool
    key_lengths: Tensor | None = None  # (B,) contiguous
    cu_q: Tensor | None = None  # (B + 1,) contiguous
    cu_k: Tensor | None = None
    seed: Tensor | None = None  # (2,) int64
    scale: Tensor | None = None  # one number, in the dtype of lse, where it isn't a Python number


class Gradients(NamedTuple):
    """A gradient for each differentiable tensor, or None where it is not needed."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of lse, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_of(stats: Tensor, unit) -> Tensor:
    """lse (B, H, Nq), all of whose gradient comes by way of log l."""
    m, log_l = stats.select(2, 0), stats.select(2, 1)
    return log_l + m.detach() * unit


def stats_rows(dtype: torch.dtype, v_head_dim: int, precise_delta: bool) -> int:
    """Rows of stats. What is not rounded to 16 bits loses nothing."""
    return 2 + (v_head_dim + 1) // 2 if precise_delta and dtype.itemsize == 2 else 2


def stats_of(lse: Tensor, stats_rows: int = 2) -> Tensor:
    """stats where lse is all that is known: m = 0."""
    batch, heads, rows = lse.shape
    stats = lse.new_zeros(batch, heads, stats_rows, rows)
    stats.select(2, 1).copy_(lse)
    return stats


@dataclass(frozen=True)
class Problem:
    """One call of attention. Query i sees key j where i + shift - left <= j <= i + shift + right (None: unbounded side), j is
    below the number of keys and no mask hides it; shift is 0, or keys - queries under lower_right. With key lengths, a batch
    has that many keys. Packed: `batch` sequences lie behind each other in n_q rows of queries and n_k rows of keys.
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
    scale: float | None = None  # None: it is a tensor
    left: int | None = None
    right: int | None = None
    lower_right: bool = False
    packed: bool = False
    has_key_lengths: bool = False
    mask: tuple[int, ...] | None = None  # shape of the boolean mask, dims that broadcast being 1
    bias: tuple[int, ...] | None = None  # shape of the additive mask
    dropout_p: float = 0.0
    softcap: float | None = None
    has_slopes: bool = False
    has_sinks: bool = False
    score_mod: tuple | None = None
    precise_delta: bool = False
    plans: dict = field(default_factory=dict, compare=False, repr=False)  # what a backend wants to work out only once

    def __post_init__(self):
        values = [getattr(self, f.name) for f in fields(self) if f.compare]
        object.__setattr__(self, "_hash", hash(tuple(values)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def lse_dtype(self) -> torch.dtype:
        return lse_dtype(self.dtype)

    @property
    def stats_rows(self) -> int:
        return stats_rows(self.dtype, self.v_head_dim, self.precise_delta)

    @property
    def heavy(self) -> bool:
        """Whether more than scale and band stands between a product and its logit, or random bits between weight and value."""
        return bool(self.mask or self.bias or self.dropout_p or self.softcap or self.has_slopes or self.score_mod)

    @property
    def several(self) -> bool:
        """Whether more than one of those is there that take registers in every score, masks aside."""
        return sum(map(bool, (self.dropout_p, self.softcap, self.has_slopes, self.score_mod))) > 1

    @property
    def linear(self) -> bool:
        """Whether logits are products of queries and keys, scaled, and nothing else."""
        return not (self.bias or self.softcap or self.has_slopes or self.has_sinks or self.score_mod)

    def unit(self, t: Tensors):
        """What m of the stats is multiplied by to be a logit."""
        if not self.linear:
            return 1.0
        return t.scale if self.scale is None else self.scale

    @functools.cached_property
    def plain(self) -> bool:
        """Whether scores are nothing but scale * q . k within a band: no tensor is there beside q, k and v."""
        return not (self.heavy or self.packed or self.has_key_lengths or self.has_sinks or self.scale is None)
