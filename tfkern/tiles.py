"""The tile sizes themselves, and where each comes from. Plain data: imports neither torch nor Triton.

Sources: MODEL, first by the cost model among all candidates (`tfkern bench sweep`, bench/cost_model.py), or next to it where
the first spilled more (sm_90, dK and dV at D = 128, is such a second); FIT, first of a list of sensible tiles, largest first,
that spilled next to nothing on Triton 3.6.0, 3.7.1 and 3.9.0 (sm_100: on 3.7.1 alone). Of both, bench/spills.json has what is
spilled, and `python bench/compile_gate.py` prints registers, spills and shared memory. COMPILES: chosen by hand, not compared
with other tiles, as those of the Gluon kernels. Nothing here has been timed on a GPU yet; `make gpu` does that.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

KERNELS = ("flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv", "flash_bwd_dbias")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_DIM_CLASSES = (16, 32, 64, 128, 256)

MODEL = "cost model, 2026-11"
FIT = "largest that fits in registers, 2026-10"
COMPILES = "compiles without spills, 2026-11"


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
SM_90 = {
    ("flash_fwd", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(128, 64, 4, 2), C(128, 64, 8, 2), C(64, 32, 8, 2)),
    ("flash_fwd", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2), C(32, 16, 8, 2), C(32, 16, 8, 2)),
    ("flash_bwd_dq", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), M(128, 64, 4, 2), M(64, 32, 4, 2), C(64, 32, 8, 2)),
    ("flash_bwd_dq", 4): _rows(C(32, 32, 4, 2), C(32, 32, 4, 2), C(64, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 4, 2)),
    ("flash_bwd_dkdv", 2): _rows(C(32, 64, 4, 2), C(32, 64, 4, 2), M(32, 64, 4, 1), M(32, 64, 4, 1), C(16, 32, 8, 2)),
    ("flash_bwd_dkdv", 4): _rows(C(32, 64, 4, 1), C(32, 32, 4, 1), C(32, 32, 8, 2), C(16, 32, 8, 2), C(16, 16, 8, 2)),
    ("flash_bwd_dbias", 2): _rows(C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 32, 8, 2), C(16, 32, 8, 2)),
    ("flash_bwd_dbias", 4): _rows(C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 8, 2)),
}  # fmt: skip
# As sm_90's where nothing better is known; the others chosen on Triton 3.7.1 alone. Of dK and dV at D = 128 the model could not
# rank the loop.
SM_100 = {
    **SM_90,
    ("flash_fwd", 2): {**SM_90["flash_fwd", 2], 64: M(64, 64, 4, 1)},
    ("flash_bwd_dq", 2): {**SM_90["flash_bwd_dq", 2], 64: M(64, 32, 4, 2), 128: C(128, 32, 8, 2)},
    ("flash_bwd_dkdv", 2): {**SM_90["flash_bwd_dkdv", 2], 64: M(32, 128, 8, 1), 128: TileConfig(32, 128, 8, 1, COMPILES)},
}
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
    "sm_90": SM_90,
    "sm_100": SM_100,
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


HOPPER_QUERIES = 64  # that one consumer warpgroup owns


@dataclass(frozen=True)
class HopperConfig:
    """Of kernels/hopper: block_n keys at a time in `stages` buffers, by `consumers` warpgroups with `registers` a thread, which
    take turns if `pingpong`; `programs` share a multiprocessor; and how these were chosen. In flash_bwd_dkdv keys and queries
    change places. The backward has no turns."""

    block_n: int
    stages: int
    consumers: int
    pingpong: bool
    registers: int
    programs: int = 1
    source: str = field(default=COMPILES, compare=False)

    def constants(self, block_d: int, owns_keys: bool = False) -> dict:
        """The kernel's compile-time constants that tell tiles; owns_keys: of flash_bwd_dkdv."""
        owned, streamed = ("BLOCK_N", "BLOCK_M") if owns_keys else ("BLOCK_M", "BLOCK_N")
        return {
            owned: HOPPER_QUERIES, streamed: self.block_n, "D": block_d, "STAGES": self.stages, "CONSUMERS": self.consumers,
            "PINGPONG": self.pingpong, "REGISTERS": self.registers,
        }  # fmt: skip

    def options(self) -> dict:
        """For the compiler. The producer's 4 warps are those of the launch."""
        share = 65536 // (self.programs * (1 + self.consumers) * 128)  # registers a thread
        options = dict(num_warps=4, enable_fp_fusion=True)  # as in portable.py
        return options if self.programs == 1 else options | dict(maxnreg=share)


class HopperTiles(NamedTuple):
    """Of one head-dim class."""

    main: HopperConfig
    wide: HopperConfig | None  # three consumers, where their larger tiles of queries leave little of the last one empty
    heavy: HopperConfig  # more than scale and band between a product and its logit: that takes registers
    single: HopperConfig  # one consumer: for no more queries than it owns
    masked: HopperConfig | None  # one consumer, which changes V where a mask hides keys; its addresses take registers

    def usual(self, n_q: int) -> HopperConfig:
        """Main or wide, whose rows, those beyond the last query too, cost less."""

        def rows(config: HopperConfig) -> int:
            tile = HOPPER_QUERIES * config.consumers
            return -(-n_q // tile) * tile

        return self.wide if self.wide is not None and rows(self.wide) * WIDE_COST < rows(self.main) else self.main


WIDE_COST = 0.87  # of a row of queries in `wide`, where one in `main` costs 1, by bench/hopper_model.py at 2,048 tokens

_SINGLE = HopperConfig(64, 2, 1, False, 216, 2)

# By head-dim class.
HOPPER = {
    64: HopperTiles(
        HopperConfig(128, 2, 2, True, 240), HopperConfig(64, 3, 3, False, 160, source=MODEL),
        HopperConfig(64, 2, 2, True, 240), _SINGLE, HopperConfig(32, 2, 1, False, 216, 2),
    ),
    128: HopperTiles(
        HopperConfig(128, 2, 2, True, 240), None, HopperConfig(64, 2, 2, True, 240), _SINGLE,
        HopperConfig(32, 2, 1, False, 240),
    ),
    256: HopperTiles(
        HopperConfig(64, 2, 2, True, 240), None, *[HopperConfig(64, 2, 1, False, 240)] * 2, None,
    ),
}  # fmt: skip

# The backward's: by kernel and head-dim class, (for more rows than one consumer owns, for no more).
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


@dataclass(frozen=True)
class HopperOnePass:
    """Of kernels/hopper/flash_bwd: shared memory for `tiles` tiles of queries of a key head, and for `ring` of dS; tiles are
    prefetched to `stages` buffers; registers a thread of each of two consumers, and of the gatherer."""

    tiles: int
    ring: int
    stages: int = 3
    registers: int = 192
    gatherer: int = 96
    source: str = field(default=COMPILES, compare=False)

    consumers = 2
    block_n = HOPPER_QUERIES

    def constants(self, block_d: int) -> dict:
        """The kernel's compile-time constants that tell tiles."""
        return {
            "BLOCK_M": HOPPER_QUERIES, "BLOCK_N": self.block_n, "D": block_d, "STAGES": self.stages, "TILES": self.tiles,
            "RING": self.ring, "REGISTERS": self.registers, "GATHERER": self.gatherer,
        }  # fmt: skip

    def options(self) -> dict:
        """For the compiler. The producer's 4 warps are those of the launch."""
        return dict(num_warps=4, enable_fp_fusion=True)


# By head-dim class, those for few queries first.
HOPPER_ONE_PASS = {64: (HopperOnePass(6, 2), HopperOnePass(8, 1))}
# Key heads of a batch from which on one pass is taken: leaving out 2 of 7 products, it may leave as many of 132 SMs idle.
HOPPER_FULL_CHIP = 96
