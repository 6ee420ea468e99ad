"""The tile sizes themselves, and where each comes from. Plain data: imports neither torch nor Triton.

Sources: MODEL, chosen by the cost model among all candidates (`tfkern bench sweep`; of float32 on sm_80 and sm_90 among a few),
or next to it where the first spilled more or was slower from 1,024 keys on (16 bits on sm_90: the forward at D = 128, dQ at
D = 256); COMPILES, chosen by hand, as those of the Gluon kernels. bench/static/spills.json has what is spilled.
Nothing here has been timed on a GPU yet; `make gpu` does that.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

KERNELS = ("flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv", "flash_bwd_dbias")
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")  # that have rows of their own
SERVED_BY = {"sm_80": "sm_80", "sm_87": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}
# Bytes of shared memory that a program may have, of all that bench/static/compile_gate.py can compile for.
SHARED = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_120": 99 * 1024,
    "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
HEAD_DIM_CLASSES = (16, 32, 64, 128, 256)

MODEL = "cost model, 2026-11"
COMPILES = "compiles without spills, 2026-11"


@dataclass(frozen=True)
class TileConfig:
    """block_m queries by block_n keys at a time, by num_warps warps, loads pipelined over num_stages; how these were chosen;
    and the registers that a thread may have at most, so that more programs share a multiprocessor (NVIDIA)."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    source: str = field(default="", compare=False)
    registers: int | None = None

    def options(self) -> dict:
        """For the compiler."""
        # Scores are one multiply-add; Triton 3.10 turns fusion off by default.
        options = dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)
        return options if self.registers is None else {**options, "maxnreg": self.registers}

    def lighter(self, kernel: str, block_d: int) -> "TileConfig":
        """Half the rows that a program owns (keys in flash_bwd_dkdv), for what takes more registers a score. Where each warp
        had 16 of them, half the warps too, but four; not at a head dim of 256, whose sums take all warps' registers."""
        if kernel == "flash_bwd_dbias":
            return self
        owned, streamed = ("block_n", "block_m") if kernel == "flash_bwd_dkdv" else ("block_m", "block_n")
        before, step, warps = getattr(self, owned), getattr(self, streamed), self.num_warps
        rows = max(16, before // 2)
        warps = min(warps, max(4, rows // 16)) if before >= 16 * warps and block_d < 256 else warps
        return replace(self, **{owned: rows, streamed: min(32, step) if kernel == "flash_fwd" else step, "num_warps": warps})


# Asymmetric on purpose: in the interpreter, which only tests use, a mix-up of the two block sizes must show.
INTERPRETER = {
    "flash_fwd": TileConfig(64, 32),
    "flash_bwd_dq": TileConfig(64, 32),
    "flash_bwd_dkdv": TileConfig(32, 64),
    "flash_bwd_dbias": TileConfig(32, 64),
}


def _rows(*configs: TileConfig) -> dict[int, TileConfig]:
    return dict(zip(HEAD_DIM_CLASSES, configs, strict=True))


M = functools.partial(TileConfig, source=MODEL)
SM_80 = {
    ("flash_fwd", 2): _rows(M(64, 64, 4, 2), M(64, 64, 4, 2), M(64, 32, 4, 2), M(128, 32, 4, 2), M(64, 64, 4, 1)),
    ("flash_fwd", 4): _rows(M(128, 32, 4, 2), M(64, 32, 4, 2), M(64, 16, 4, 1), M(64, 16, 4, 2), M(32, 16, 8, 2)),
    ("flash_bwd_dq", 2): _rows(M(64, 64, 4, 2), M(128, 32, 4, 2), M(128, 32, 4, 2), M(128, 32, 4, 2), M(32, 32, 4, 2)),
    ("flash_bwd_dq", 4): _rows(M(64, 64, 4, 2), M(64, 32, 4, 1), M(32, 32, 4, 2), M(32, 16, 4, 2), M(16, 16, 4, 2)),
    ("flash_bwd_dkdv", 2): _rows(M(64, 64, 4, 1), M(32, 64, 4, 1), M(32, 64, 4, 2), M(32, 64, 4, 1), M(32, 32, 4, 1)),
    ("flash_bwd_dkdv", 4): _rows(M(64, 64, 4, 1), M(32, 64, 4, 1), M(16, 64, 4, 1), M(16, 32, 4, 1), M(16, 16, 4, 1)),
    ("flash_bwd_dbias", 2): _rows(M(64, 64, 4, 1), M(64, 32, 4, 1), M(64, 32, 4, 1), M(64, 32, 4, 1), M(32, 16, 4, 1)),
    ("flash_bwd_dbias", 4): _rows(M(32, 16, 4, 1), M(32, 32, 4, 1), M(32, 32, 4, 1), M(64, 16, 4, 1), M(16, 16, 4, 1)),
}  # fmt: skip
# Of chips with 99 KiB of shared memory a program, and 100 a multiprocessor.
SM_86 = {
    **SM_80,
    ("flash_fwd", 2): {**SM_80["flash_fwd", 2], 256: M(64, 32, 4, 2)},  # next to one that spills 504 bytes on sm_120
    ("flash_bwd_dkdv", 2): {**SM_80["flash_bwd_dkdv", 2], 128: M(16, 64, 4, 2)},
}
SM_90 = {
    ("flash_fwd", 2): _rows(M(64, 64, 4, 2), M(64, 64, 4, 2), M(128, 64, 4, 2), M(128, 64, 8, 2), M(128, 32, 8, 2)),
    ("flash_fwd", 4): _rows(M(128, 32, 4, 2), M(64, 64, 4, 2), M(64, 16, 4, 1), M(32, 16, 8, 2), M(32, 16, 8, 2)),
    ("flash_bwd_dq", 2): _rows(M(64, 64, 4, 2), M(64, 64, 4, 2), M(128, 64, 4, 2), M(64, 32, 4, 2), M(128, 32, 8, 2)),
    ("flash_bwd_dq", 4): _rows(M(64, 64, 4, 2), M(64, 32, 4, 2), M(32, 32, 4, 2), M(32, 16, 4, 2), M(16, 16, 4, 2)),
    ("flash_bwd_dkdv", 2): _rows(M(64, 64, 4, 1), M(64, 64, 4, 1), M(32, 64, 4, 1), M(32, 64, 4, 1), M(32, 64, 8, 2)),
    ("flash_bwd_dkdv", 4): _rows(M(32, 64, 4, 1), M(32, 64, 4, 1), M(16, 64, 4, 1), M(16, 32, 4, 1), M(16, 16, 4, 1)),
    ("flash_bwd_dbias", 2): _rows(M(64, 32, 4, 1), M(64, 32, 4, 1), M(64, 64, 4, 1), M(128, 64, 8, 1), M(64, 64, 8, 1)),
    ("flash_bwd_dbias", 4): _rows(M(32, 32, 4, 1), M(32, 32, 4, 1), M(64, 16, 4, 1), M(32, 32, 4, 2), M(32, 16, 4, 1)),
}  # fmt: skip
# fp32 as sm_90's, ranked for that chip, as nothing better is known.
SM_100 = {
    **SM_90,
    ("flash_fwd", 2): _rows(M(128, 64, 4, 1), M(64, 64, 4, 1), M(64, 64, 4, 1), M(128, 32, 8, 2), M(128, 64, 8, 1)),
    ("flash_bwd_dq", 2): _rows(M(128, 32, 4, 2), M(128, 32, 4, 2), M(64, 32, 4, 2), M(128, 32, 8, 2), M(128, 32, 8, 1)),
    ("flash_bwd_dq", 4): {**SM_90["flash_bwd_dq", 4], 128: M(32, 16, 8, 2)},  # next to one that spills 360 bytes
    ("flash_bwd_dkdv", 2): _rows(M(32, 64, 4, 1), M(64, 64, 4, 1), M(32, 128, 8, 1), M(32, 128, 8, 1), M(32, 32, 4, 1)),
    ("flash_bwd_dbias", 2): _rows(M(32, 32, 4, 1), M(32, 32, 4, 1), M(32, 32, 4, 1), M(64, 32, 4, 1), M(32, 16, 4, 2)),
}  # fmt: skip
TABLE = {
    "sm_80": SM_80,
    "sm_86": SM_86,
    "sm_90": SM_90,
    "sm_100": SM_100,
    "gfx942": {
        ("flash_fwd", 2): _rows(M(128, 64, 4, 1), M(128, 64, 4, 1), M(128, 32, 4, 2), M(64, 32, 4, 2), M(64, 64, 4, 1)),
        ("flash_fwd", 4): _rows(M(64, 16, 4, 3), M(128, 32, 4, 1), M(64, 16, 4, 2), M(32, 16, 4, 2), M(16, 16, 4, 1)),
        ("flash_bwd_dq", 2): _rows(M(128, 32, 4, 1), M(64, 32, 4, 2), M(128, 32, 4, 1), M(64, 32, 4, 1), M(64, 32, 4, 1)),
        ("flash_bwd_dq", 4): _rows(M(128, 32, 4, 1), M(64, 16, 4, 3), M(64, 16, 4, 3), M(64, 16, 4, 3), M(32, 16, 4, 1)),
        ("flash_bwd_dkdv", 2): _rows(M(16, 64, 4, 1), M(32, 128, 4, 1), M(32, 128, 4, 1), M(16, 64, 4, 1), M(16, 64, 8, 1)),
        ("flash_bwd_dkdv", 4): _rows(M(16, 64, 4, 1), M(32, 128, 4, 1), M(16, 64, 4, 1), M(16, 32, 4, 1), M(16, 16, 4, 1)),
        ("flash_bwd_dbias", 2): _rows(M(64, 64, 4, 1), M(64, 64, 4, 1), M(128, 64, 8, 1), M(64, 64, 4, 1), M(32, 16, 4, 1)),
        ("flash_bwd_dbias", 4): _rows(M(64, 16, 4, 1), M(64, 16, 4, 1), M(64, 16, 4, 1), M(32, 16, 4, 1), M(32, 16, 4, 1)),
    },
}  # fmt: skip

# (architecture, element size, head-dim class): tiles for a backward in one pass, for few keys first.
ONE_PASS_TABLE = {
    **{("interpreter", itemsize, block_d): (TileConfig(32, 64),) for itemsize in (2, 4) for block_d in HEAD_DIM_CLASSES},
    ("sm_90", 2, 64): (M(32, 64, 4, 1), M(64, 128, 8, 1)),
}

# The same: tiles of flash_bwd_dkdv where TMA brings its queries, and no addresses of theirs take registers.
DESCRIPTOR_TABLE = {
    **{("interpreter", 2, block_d): TileConfig(32, 64) for block_d in HEAD_DIM_CLASSES},
    ("sm_90", 2, 32): M(64, 64, 4, 2, registers=168),
    ("sm_90", 2, 64): M(64, 64, 4, 2, registers=168),
    ("sm_90", 2, 128): M(64, 64, 4, 2),
}


HOPPER_QUERIES = 64  # that one consumer warpgroup owns


@dataclass(frozen=True)
class HopperConfig:
    """Of kernels/hopper: block_n keys at a time in `stages` buffers, by `consumers` warpgroups with `registers` a thread, which
    take turns if `pingpong`; `programs` share a multiprocessor; and how these were chosen. In flash_bwd_dkdv keys and queries
    change places. The backward has no turns.

    cycles: what a consumer takes for a tile of queries beside its loop, and for each tile of keys in it; by
    bench/static/hopper_model.py, an estimate.
    """

    block_n: int
    stages: int
    consumers: int
    pingpong: bool
    registers: int
    programs: int = 1
    cycles: tuple[int, int] = field(default=(0, 0), compare=False)
    source: str = field(default=COMPILES, compare=False)

    def constants(self, block_d: int, owns_keys: bool = False) -> dict:
        """The kernel's compile-time constants that tell tiles; owns_keys: of flash_bwd_dkdv."""
        owned, streamed = ("BLOCK_N", "BLOCK_M") if owns_keys else ("BLOCK_M", "BLOCK_N")
        return {
            owned: HOPPER_QUERIES, streamed: self.block_n, "BLOCK_D": block_d, "STAGES": self.stages,
            "CONSUMERS": self.consumers, "PINGPONG": self.pingpong, "REGISTERS": self.registers,
        }  # fmt: skip

    def options(self) -> dict:
        """For the compiler. The producer's 4 warps are those of the launch."""
        share = 65536 // (self.programs * (1 + self.consumers) * 128)  # registers a thread
        options = dict(num_warps=4, enable_fp_fusion=True)  # as in portable.py
        return options if self.programs == 1 else options | dict(maxnreg=share)


class HopperLoad(NamedTuple):
    """What there is to do in one launch of the forward, and on how many multiprocessors."""

    heads: int  # of queries, of all batches
    group: int
    n_q: int
    n_k: int
    causal: bool
    multiprocessors: int

    def cycles(self, config: HopperConfig, short: bool) -> float:
        """An estimate of how long it takes; short: by flash_fwd_short, whose consumers don't wait for each other."""
        owned = HOPPER_QUERIES * (1 if short else config.consumers)
        ends = [min(start + owned, self.n_k) if self.causal else self.n_k for start in range(0, self.n_q, owned)]
        outside, tile = config.cycles
        head = sum(outside + -(-end // config.block_n) * tile for end in ends)
        if short:  # of the multiprocessor that has most
            return -(-self.heads // self.group // self.multiprocessors) * self.group * head / config.consumers
        return -(-self.heads * len(ends) // self.multiprocessors) * head / len(ends)


class HopperTiles(NamedTuple):
    """Of one head-dim class. Of several that a problem could have it takes those that are predicted fastest."""

    usual: tuple[HopperConfig, ...]
    heavy: tuple[HopperConfig, ...]  # more than scale and band between a product and its logit; the first fits several features
    short: HopperConfig | None  # of flash_fwd_short, K and V resident
    single: HopperConfig  # one consumer: for no more queries than it owns
    masked: HopperConfig | None  # one consumer, which changes V where a mask hides keys; its addresses take registers

    def alone(self, config: HopperConfig, short: bool) -> "HopperTiles":
        """These, but for `config` as the only choice, or the only one but short."""
        if short:
            return self._replace(usual=(), heavy=(), short=config)
        return self._replace(usual=(config,), heavy=(config,), short=None)

    def fastest(
        self, load: HopperLoad, heavy: bool = False, several: bool = False, resident: bool = True
    ) -> tuple[HopperConfig, bool]:
        """(the tiles for a problem, whether they are `short`); resident: whether K and V may stay if they fit. heavy and
        several as Problem has them."""
        fitting = self.heavy[:1] if several else self.heavy if heavy else self.usual
        found = [(config, False) for config in fitting]
        if resident and self.short and load.n_k <= self.short.stages * self.short.block_n:
            found.append((self.short, True))
        return min(found, key=lambda candidate: load.cycles(*candidate))


_SINGLE = HopperConfig(64, 2, 1, False, 216, 2)
_WIDE_64 = HopperConfig(64, 3, 3, False, 160, cycles=(514, 1065), source=MODEL)

# By head-dim class.
HOPPER = {
    64: HopperTiles(
        (HopperConfig(128, 2, 2, True, 240, cycles=(364, 1594)), _WIDE_64),
        (HopperConfig(64, 2, 2, True, 240, cycles=(540, 1125)), _WIDE_64),
        HopperConfig(64, 11, 3, False, 160, cycles=(710, 1088), source=MODEL),
        _SINGLE,
        HopperConfig(32, 2, 1, False, 216, 2),
    ),
    128: HopperTiles(
        (
            HopperConfig(128, 2, 2, True, 240, cycles=(508, 1951)),
            HopperConfig(64, 3, 3, False, 160, cycles=(662, 1282), source=MODEL),
        ),
        (HopperConfig(64, 2, 2, True, 240),),
        None,
        _SINGLE,
        HopperConfig(32, 2, 1, False, 240),
    ),
    256: HopperTiles(
        (HopperConfig(64, 2, 2, True, 240),),
        (HopperConfig(64, 2, 1, False, 240),),
        None,
        HopperConfig(64, 2, 1, False, 240),
        None,
    ),
}


class HopperBackwardTiles(NamedTuple):
    """Of one kernel of the backward and one head-dim class."""

    usual: HopperConfig
    heavy: HopperConfig  # as HopperTiles.heavy
    single: HopperConfig  # one consumer: for no more rows than it owns


HOPPER_BACKWARD = {
    "flash_bwd_dq": {
        64: HopperBackwardTiles(
            HopperConfig(64, 3, 2, False, 216), HopperConfig(32, 3, 2, False, 232), HopperConfig(64, 3, 1, False, 240)
        ),
        128: HopperBackwardTiles(
            HopperConfig(64, 3, 2, False, 216), HopperConfig(32, 3, 1, False, 240), HopperConfig(64, 3, 1, False, 240)
        ),
    },
    "flash_bwd_dkdv": {
        64: HopperBackwardTiles(
            HopperConfig(64, 3, 2, False, 232), HopperConfig(32, 3, 2, False, 232), HopperConfig(64, 3, 1, False, 240)
        ),
        128: HopperBackwardTiles(
            HopperConfig(64, 3, 2, False, 240), HopperConfig(32, 3, 1, False, 240), HopperConfig(64, 3, 1, False, 240)
        ),
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
            "BLOCK_M": HOPPER_QUERIES, "BLOCK_N": self.block_n, "BLOCK_D": block_d, "STAGES": self.stages, "TILES": self.tiles,
            "RING": self.ring, "REGISTERS": self.registers, "GATHERER": self.gatherer,
        }  # fmt: skip

    def options(self) -> dict:
        """For the compiler. The producer's 4 warps are those of the launch."""
        return dict(num_warps=4, enable_fp_fusion=True)


# By head-dim class, those for few queries first.
HOPPER_ONE_PASS = {64: (HopperOnePass(6, 2), HopperOnePass(8, 1))}
HOPPER_ONE_PASS_SPILLS = (3, 8)  # with this Triton and newer ones, 144 bytes and more in its loops
# Key heads of a batch from which on one pass is taken: leaving out 2 of 7 products, it may leave as many of 132 SMs idle.
HOPPER_FULL_CHIP = 96
