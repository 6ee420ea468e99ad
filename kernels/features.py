"""The optional arguments of attention as the kernels take them: one tuple, in which what is None compiles away.

Whole numbers in a tuple arrive as 2 n + 3, which Triton's JIT never specialises on (see tile.py); `tile.whole` decodes.
"""

from typing import Any, NamedTuple


class Mask(NamedTuple):
    """A tensor (B, H, n_q, n_k) of any strides, 0 on broadcast dims."""

    ptr: Any
    stride: Any  # as in tile.py, with its own VEC
    rows: Any  # queries and keys that it has, encoded; of a broadcast dim, more than there can be
    columns: Any


class Slopes(NamedTuple):
    """ALiBi's slopes (B, H); strides encoded."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class Dropout(NamedTuple):
    """Of 65536 equally likely numbers, those below `threshold` (encoded) drop; what is kept is scaled by `factor`."""

    seed: Any  # pointer to two int64
    threshold: Any
    factor: Any


class Features(NamedTuple):
    """What a call of attention has beside queries, keys, values, scale and band."""

    key_lengths: Any = None  # (B,) integers: keys from there on do not exist
    cu_q: Any = None  # (B + 1,) integers: where packed sequences start, for queries and for keys
    cu_k: Any = None
    scale: Any = None  # pointer to one float32, instead of the number
    softcap: Any = None
    mask: Any = None  # Mask of uint8: 0 hides
    bias: Any = None  # Mask of floats, added to scores
    slopes: Any = None  # Slopes
    sinks: Any = None  # (H,)
    dropout: Any = None  # Dropout


NONE = Features()
