"""The tile sizes themselves, and where each comes from. Plain data: imports neither torch nor Triton.

Sources: MODEL, first by the cost model among all candidates (`tfkern bench sweep`, bench/cost_model.py); FIT, the first of a
list of sensible tiles, largest first, that spilled next to nothing on Triton 3.6.0, 3.7.1 and 3.9.0. Of both, bench/spills.json
has what is spilled, and `python bench/compile_gate.py` prints registers, spills and shared memory. Nothing here has been timed
on a GPU yet; `make gpu` does that.
"""

import functools
from dataclasses import dataclass, field, replace

KERNELS = ("flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv", "flash_bwd_dbias")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_DIM_CLASSES = (16, 32, 64, 128, 256)

MODEL = "cost model, 2026-11"
FIT = "largest that fits in registers, 2026-10"


@dataclass(frozen=True)
class TileConfig:
    """block_m queries by block_n keys at a time, by num_warps warps, loads pipelined over num_stages; and how these
    were chosen."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    source: str = field(default="", compare=False)

    def lighter(self, kernel: str) -> "TileConfig":
        """Half the rows that a program owns (keys in flash_bwd_dkdv), for what takes more registers a score."""
        if kernel == "flash_bwd_dkdv":
            return replace(self, block_n=max(16, self.block_n // 2))
        if kernel == "flash_bwd_dbias":
            return self
        if kernel == "flash_fwd":
            return replace(self, block_m=max(16, self.block_m // 2), block_n=min(32, self.block_n))
        return replace(self, block_m=max(16, self.block_m // 2))


# Asymmetric on purpose: in the interpreter, which only tests use, a mix-up of the two block sizes must show.
INTERPRETER = {
    "flash_fwd": TileConfig(64, 32),
    "flash_bwd_dq": TileConfig(64, 32),
    "flash_bwd_dkdv": TileConfig(32, 64),
    "flash_bwd_dbias": TileConfig(32, 64),
}


def _rows(*configs: TileConfig) -> dict[int, TileConfig]:
    return dict(zip(HEAD_DIM_CLASSES, configs, strict=True))


C = functools.partial(TileConfig, source=FIT)
M = functools.partial(TileConfig, source=MODEL)
TABLE = {
    "sm_80": {
        ("flash_fwd", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(64, 32, 4, 2), C(64, 64, 8, 2), C(64, 32, 8, 2)),
        ("flash_fwd", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(32, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 8, 1)),
        ("flash_bwd_dq", 2): _rows(C(64, 64, 4, 2), C(64, 64, 4, 2), M(128, 32, 4, 2), C(128, 32, 8, 2), C(64, 32, 8, 1)),
        ("flash_bwd_dq", 4): _rows(C(64, 32, 4, 2), C(32, 32, 4, 2), C(32, 32, 8, 2), C(32, 16, 4, 2), C(16, 16, 4, 2)),
        ("flash_bwd_dkdv", 2): _rows(C(32, 64, 4, 1), C(32, 64, 4, 1), M(32, 64, 4, 2), C(32, 64, 8, 1), C(16, 32, 8, 2)),
        ("flash_bwd_dkdv", 4): _rows(C(32, 64, 4, 1), C(32, 32, 4, 1), C(16, 32, 4, 1), C(16, 32, 8, 1), C(16, 16, 8, 2)),
        ("flash_bwd_dbias", 2): _rows(C(64, 32, 8, 2), C(64, 32, 8, 2), C(64, 32, 8, 2), C(32, 32, 8, 2), C(16, 32, 8, 2)),
        ("flash_bwd_dbias", 4): _rows(C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 32, 8, 2), C(16, 16, 8, 2), C(16, 16, 8, 2)),
    },
    "sm_90": {
        ("flash_fwd", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(128, 64, 4, 2), C(128, 64, 8, 2), C(64, 32, 8, 2)),
        ("flash_fwd", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2), C(32, 16, 8, 2), C(32, 16, 8, 2)),
        ("flash_bwd_dq", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(128, 64, 4, 2), M(64, 32, 4, 2), C(64, 32, 8, 2)),
        ("flash_bwd_dq", 4): _rows(C(32, 32, 4, 2), C(32, 32, 4, 2), C(64, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 4, 2)),
        ("flash_bwd_dkdv", 2): _rows(C(32, 64, 4, 2), C(32, 64, 4, 2), M(32, 64, 4, 1), M(32, 64, 4, 1), C(16, 32, 8, 2)),
        ("flash_bwd_dkdv", 4): _rows(C(32, 64, 4, 1), C(32, 32, 4, 1), C(32, 32, 8, 2), C(16, 32, 8, 2), C(16, 16, 8, 2)),
        ("flash_bwd_dbias", 2): _rows(C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 32, 8, 2), C(16, 32, 8, 2)),
        ("flash_bwd_dbias", 4): _rows(C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 8, 2)),
    },
    "sm_100": {
        ("flash_fwd", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(64, 64, 4, 1), C(128, 64, 8, 2), C(64, 32, 8, 2)),
        ("flash_fwd", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2), C(32, 16, 8, 2), C(32, 16, 8, 2)),
        ("flash_bwd_dq", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(64, 32, 4, 2), C(128, 32, 8, 2), C(64, 32, 8, 2)),
        ("flash_bwd_dq", 4): _rows(C(32, 32, 4, 2), C(32, 32, 4, 2), C(64, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 4, 2)),
        ("flash_bwd_dkdv", 2): _rows(C(32, 64, 4, 2), C(32, 64, 4, 2), M(32, 128, 8, 1), M(32, 128, 8, 1), C(16, 32, 8, 2)),
        ("flash_bwd_dkdv", 4): _rows(C(32, 64, 4, 1), C(32, 32, 4, 1), C(32, 32, 8, 2), C(16, 32, 8, 2), C(16, 16, 8, 2)),
        ("flash_bwd_dbias", 2): _rows(C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 32, 8, 2), C(16, 32, 8, 2)),
        ("flash_bwd_dbias", 4): _rows(C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 8, 2)),
    },
    "gfx942": {
        ("flash_fwd", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(128, 32, 4, 2), C(128, 64, 8, 2), C(64, 32, 4, 1)),
        ("flash_fwd", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2), C(32, 32, 4, 2), C(32, 16, 8, 2)),
        ("flash_bwd_dq", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(128, 32, 4, 1), C(128, 32, 8, 1), C(32, 32, 4, 1)),
        ("flash_bwd_dq", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2), C(32, 32, 4, 2), C(16, 16, 4, 2)),
        ("flash_bwd_dkdv", 2): _rows(C(64, 64, 4, 1), C(64, 64, 4, 1), M(32, 128, 4, 1), C(16, 64, 4, 2), C(16, 32, 8, 1)),
        ("flash_bwd_dkdv", 4): _rows(C(32, 64, 4, 2), C(16, 32, 4, 1), C(32, 32, 4, 1), C(16, 32, 8, 1), C(16, 16, 4, 1)),
        ("flash_bwd_dbias", 2): _rows(C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 32, 4, 2), C(32, 32, 4, 2)),
        ("flash_bwd_dbias", 4): _rows(C(32, 32, 4, 2), C(32, 32, 4, 2), C(32, 32, 4, 2), C(32, 16, 4, 2), C(16, 16, 4, 2)),
    },
}  # fmt: skip

# (architecture, element size, head-dim class): tiles for a backward in one pass, for few keys first.
ONE_PASS_TABLE = {
    **{("interpreter", itemsize, block_d): (C(32, 64),) for itemsize in (2, 4) for block_d in HEAD_DIM_CLASSES},
    ("sm_90", 2, 64): (M(32, 64, 4, 1), M(64, 128, 8, 1)),
}


@dataclass(frozen=True)
class HopperConfig:
    """Of kernels/hopper: block_n keys at a time in `stages` buffers, by `consumers` warpgroups of 64 queries each, with
    `registers` a thread, which take turns if `pingpong`; and how these were chosen. In flash_bwd_dkdv keys and queries change
    places. The backward has no turns."""

    block_n: int
    stages: int
    consumers: int
    pingpong: bool
    registers: int
    source: str = field(default=FIT, compare=False)


# By head-dim class: (for more than 64 queries, for up to 64).
HOPPER = {
    64: (HopperConfig(128, 2, 2, True, 240), HopperConfig(64, 2, 1, False, 240)),
    128: (HopperConfig(128, 2, 2, True, 240), HopperConfig(64, 2, 1, False, 240)),
}

# The backward's, likewise: by kernel and head-dim class, (for more than 64 rows, for up to 64). Source: they compile with next
# to no spills (bench/notes-hopper.md), 2026-11; they were not swept, and nothing is timed yet.
HOPPER_BACKWARD = {
    "flash_bwd_dq": {
        64: (HopperConfig(64, 3, 2, False, 216), HopperConfig(64, 3, 1, False, 240)),
        128: (HopperConfig(64, 3, 2, False, 216), HopperConfig(64, 3, 1, False, 240)),
    },
    "flash_bwd_dkdv": {
        64: (HopperConfig(64, 3, 2, False, 232), HopperConfig(64, 3, 1, False, 240)),
        128: (HopperConfig(64, 3, 2, False, 240), HopperConfig(64, 3, 1, False, 240)),
    },
}
