"""Device side of attention's optional arguments: one tuple for all of them, in which a None compiles away.

A whole number n in a tuple is passed as 2 n + 3, on which Triton's JIT never specialises (tile.py); `tile.whole` decodes it.
"""

from typing import Any, NamedTuple


class Mask(NamedTuple):
    """A tensor (B, H, n_q, n_k) of any strides. Dimensions along which it broadcasts have stride 0."""

    ptr: Any
    stride: Any  # as in tile.py, with MASK_VEC for VEC
    rows: Any  # its numbers of queries and keys, encoded; of a dimension that broadcasts, more than there can be
    columns: Any


class Slopes(NamedTuple):
    """ALiBi's slopes (B, H); strides encoded."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class Dropout(NamedTuple):
    """A probability is dropped if its random number, one of 65536 equally likely ones, is below `threshold` (encoded). What is
    kept is multiplied by `factor`."""

    seed: Any  # pointer to two int64
    threshold: Any
    factor: Any


class Features(NamedTuple):
    """What a call of attention has besides queries, keys, values, scale and band."""

    key_lengths: Any = None  # (B,) integers: how many keys of a sequence exist
    cu_q: Any = None  # (B + 1,) integers: the first row of each packed sequence, of queries and of keys
    cu_k: Any = None
    scale: Any = None  # pointer to one float32, instead of the number
    softcap: Any = None
    mask: Any = None  # Mask of uint8: 0 hides
    bias: Any = None  # Mask of floats, added to scores
    slopes: Any = None  # Slopes
    sinks: Any = None  # (H,)
    dropout: Any = None  # Dropout


NONE = Features()
