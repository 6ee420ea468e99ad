"""What a kernel is compiled for, as one argument of the functions below it.

A kernel builds it by name from its constexpr parameters: `C: tl.constexpr = Static(HEAD_DIM=HEAD_DIM, …)`. A kernel may leave
out fields that no function below it reads.
"""

from typing import Any, NamedTuple


class Static(NamedTuple):
    """Compile-time constants. score.py reads MOD, MOD_GRAD, LINEAR and MASK_VEC of any such tuple, Hopper's too."""

    HEAD_DIM: Any = None  # of queries and keys
    HEAD_DIM_V: Any = None  # of values
    BLOCK_D: Any = None  # HEAD_DIM, rounded up to a size that tiles have
    BLOCK_DV: Any = None  # HEAD_DIM_V, rounded up likewise
    VEC: Any = None  # what loads may assume of strides (tile.py)
    PRECISION: Any = None  # input_precision of dots
    MOD: Any = None  # the user's score_mod (score.py), a jit function or None
    MOD_GRAD: Any = None  # its derivative; None in a forward
    LINEAR: Any = None  # logits are scale * q . k and nothing else
    MASK_VEC: Any = None  # VEC for the strides of a mask or a bias
    STATS_ROWS: Any = None  # of STATS (rounding.py)
    BLOCK_M: Any = None  # queries of a tile
    BLOCK_N: Any = None  # keys of a tile
