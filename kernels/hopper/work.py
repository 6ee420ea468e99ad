"""What a kernel for Hopper is launched for: Static at compile time, Work at run time."""

from typing import Any, NamedTuple


class Static(NamedTuple):
    """Compile-time constants; a kernel builds the tuple from its own. score.py reads the first four, which are as in
    kernels/static.py."""

    MOD: Any = None
    MOD_GRAD: Any = None
    LINEAR: Any = None
    MASK_VEC: Any = 0
    HEAD_DIM: Any = None
    BLOCK_D: Any = None  # HEAD_DIM rounded up to a size of tiles
    BLOCK_M: Any = None  # queries of a tile
    BLOCK_N: Any = None  # keys of a tile
    STAGES: Any = None  # buffers for tiles that the producer fetches ahead
    CONSUMERS: Any = None
    PINGPONG: Any = False  # two consumers take turns to multiply
    TILES: Any = None  # of flash_bwd: slots for tiles of queries
    RING: Any = None  # of flash_bwd: buffers for messages to the gatherer


class Work(NamedTuple):
    """The numbers of a launch, the same for all programs. left and right may be None, as in kernels/band.py."""

    scale: Any
    batch: Any
    heads: Any
    group: Any  # heads of queries to a head of keys
    n_q: Any
    n_k: Any
    tiles: Any
    items: Any  # that persistent programs share; None where a program has one
    align: Any
    left: Any
    right: Any
