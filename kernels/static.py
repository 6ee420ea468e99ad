"""What a kernel is compiled for, as one argument of the functions below it.

A kernel builds it from its constexpr parameters: `C: tl.constexpr = Static(HEAD_DIM=HEAD_DIM, …)`. The functions that all
kernels share read what they need of it; a kernel leaves out what nothing below it reads.
"""

from typing import Any, NamedTuple


class Static(NamedTuple):
    """Compile-time constants. The functions that Hopper's kernels share read MOD, MOD_GRAD, LINEAR and MASK_VEC."""

    HEAD_DIM: Any = None  # of queries and keys, and of values
    HEAD_DIM_V: Any = None
    BLOCK_D: Any = None  # the same, rounded up to a size of tiles
    BLOCK_DV: Any = None
    VEC: Any = None  # what loads may assume of strides (tile.py)
    PRECISION: Any = None  # of dots of float32
    MOD: Any = None  # the user's change of scores and its derivative (score.py), jit functions; in a forward MOD alone
    MOD_GRAD: Any = None
    LINEAR: Any = None  # logits are products of q and k times scale, and nothing else
    MASK_VEC: Any = None  # as VEC, for the strides of a mask or a bias
    STATS_ROWS: Any = None  # rows of STATS (rounding.py)
    BLOCK_M: Any = None  # queries and keys of a tile
    BLOCK_N: Any = None
