"""Tile sizes by architecture, kernel, element size and head-dim class. Plain data: imports neither torch nor Triton.

Source of every row: compiled for its architecture with Triton 3.6.0, 3.7.1 and 3.9.0, and taken as the first of a list of
sensible tiles, largest first, that spilled nothing or next to nothing (bench/spills.json has what is left; `python
bench/compile_gate.py` prints registers, spills and shared memory). Nothing here has been timed on a GPU yet.
"""

import contextlib
from dataclasses import dataclass, replace

KERNELS = ("flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv", "flash_bwd_dbias")
ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
HEAD_DIM_CLASSES = (16, 32, 64, 128, 256)
ONE_PASS = "flash_bwd_one_pass"
FULL_CHIP = 128  # programs; an H100 has 132 SMs


@dataclass(frozen=True)
class TileConfig:
    """block_m queries by block_n keys at a time, by num_warps warps, loads pipelined over num_stages."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2

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
_INTERPRETER = {
    "flash_fwd": TileConfig(64, 32),
    "flash_bwd_dq": TileConfig(64, 32),
    "flash_bwd_dkdv": TileConfig(32, 64),
    "flash_bwd_dbias": TileConfig(32, 64),
}

# Of the whole process, not of a context: autograd runs backwards of GPU tensors in threads of its own.
_overrides: dict[str, TileConfig | None] = {}


def head_dim_class(head_dim: int) -> int:
    """The padded head dim that kernels compute with: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_config(arch: str, kernel: str, itemsize: int, block_d: int, heavy: bool = False) -> TileConfig:
    """The tiles for one launch. arch is "sm_NN", "gfx…" or "interpreter"; block_d a head-dim class; itemsize 2 or 4 bytes;
    `heavy` where scores go through more than a band: a mask, a bias, dropout, softcap, ALiBi or a score_mod."""
    if kernel in _overrides:
        return _overrides[kernel]
    if arch == "interpreter":
        return _INTERPRETER[kernel]
    config = _TABLE[table_arch(arch)][kernel, itemsize][block_d]
    return config.lighter(kernel) if heavy else config


def table_arch(arch: str) -> str:
    """The architecture whose rows serve `arch`. Those of sm_80 need at most 99 KiB of shared memory, which every chip has."""
    if arch.startswith("gfx"):
        return "gfx942"
    return "sm_90" if arch in ("sm_90", "sm_100", "sm_103") else "sm_80"


def one_pass(arch: str, itemsize: int, block_d: int, n_k: int, programs: int, heavy: bool) -> TileConfig | None:
    """The tiles of flash_bwd_dkdv where it makes the whole backward in one pass, its tile holding all n_k keys; None where two
    passes are better: more keys than a tile holds without spilling, or none at all; too few programs (one a batch and key
    head) to fill the chip, which two passes divide further; or so much to do for a score that it spills. Arguments as for
    tile_config."""
    if ONE_PASS in _overrides:
        config = _overrides[ONE_PASS]
        return config if config and 0 < n_k <= config.block_n else None
    if n_k == 0 or (arch != "interpreter" and (heavy or programs < FULL_CHIP)):
        return None
    return next((config for config in one_pass_tiles(arch, itemsize, block_d) if n_k <= config.block_n), None)


def one_pass_tiles(arch: str, itemsize: int, block_d: int) -> list[TileConfig]:
    """All that one_pass chooses from, those for few keys first."""
    return list(_ONE_PASS.get((arch if arch == "interpreter" else table_arch(arch), itemsize, block_d), ()))


@contextlib.contextmanager
def override(**configs: TileConfig | None):
    """Within the block, in all threads, the kernels named by keyword use the given tiles:
    `with override(flash_fwd=TileConfig(32, 16)): …`. flash_bwd_one_pass are the tiles of a backward in one pass, taken whenever
    they hold all keys; None for never."""
    if unknown := configs.keys() - {*KERNELS, ONE_PASS}:
        raise ValueError(f"no kernel is called {sorted(unknown)}; the kernels are {(*KERNELS, ONE_PASS)}")
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def overrides() -> tuple:
    """What is overridden now: with it, the answers of tile_config may be kept."""
    return tuple(_overrides.items())


def _rows(*configs: TileConfig) -> dict[int, TileConfig]:
    return dict(zip(HEAD_DIM_CLASSES, configs, strict=True))


C = TileConfig
_TABLE = {
    "sm_80": {
        ("flash_fwd", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), C(128, 32, 4, 2), C(64, 64, 8, 2), C(64, 32, 8, 2)),
        ("flash_fwd", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(32, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 8, 1)),
        ("flash_bwd_dq", 2): _rows(C(64, 64, 4, 2), C(64, 64, 4, 2), C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 32, 8, 1)),
        ("flash_bwd_dq", 4): _rows(C(64, 32, 4, 2), C(32, 32, 4, 2), C(32, 32, 8, 2), C(32, 16, 4, 2), C(16, 16, 4, 2)),
        ("flash_bwd_dkdv", 2): _rows(C(32, 64, 4, 1), C(32, 64, 4, 1), C(32, 128, 8, 1), C(32, 64, 8, 1), C(16, 32, 8, 2)),
        ("flash_bwd_dkdv", 4): _rows(C(32, 64, 4, 1), C(32, 32, 4, 1), C(16, 32, 4, 1), C(16, 32, 8, 1), C(16, 16, 8, 2)),
        ("flash_bwd_dbias", 2): _rows(C(64, 32, 8, 2), C(64, 32, 8, 2), C(64, 32, 8, 2), C(32, 32, 8, 2), C(16, 32, 8, 2)),
        ("flash_bwd_dbias", 4): _rows(C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 32, 8, 2), C(16, 16, 8, 2), C(16, 16, 8, 2)),
    },
    "sm_90": {
        ("flash_fwd", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), C(128, 64, 4, 2), C(128, 64, 8, 2), C(64, 32, 8, 2)),
        ("flash_fwd", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2), C(32, 16, 8, 2), C(32, 16, 8, 2)),
        ("flash_bwd_dq", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 32, 8, 2)),
        ("flash_bwd_dq", 4): _rows(C(32, 32, 4, 2), C(32, 32, 4, 2), C(64, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 4, 2)),
        ("flash_bwd_dkdv", 2): _rows(C(32, 64, 4, 2), C(32, 64, 4, 2), C(32, 64, 4, 1), C(16, 64, 8, 2), C(16, 32, 8, 2)),
        ("flash_bwd_dkdv", 4): _rows(C(32, 64, 4, 1), C(32, 32, 4, 1), C(32, 32, 8, 2), C(16, 32, 8, 2), C(16, 16, 8, 2)),
        ("flash_bwd_dbias", 2): _rows(C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 32, 8, 2), C(16, 32, 8, 2)),
        ("flash_bwd_dbias", 4): _rows(C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 32, 8, 2), C(32, 16, 8, 2), C(16, 16, 8, 2)),
    },
    "gfx942": {
        ("flash_fwd", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), C(128, 64, 4, 2), C(128, 64, 8, 2), C(64, 32, 4, 1)),
        ("flash_fwd", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2), C(32, 32, 4, 2), C(32, 16, 8, 2)),
        ("flash_bwd_dq", 2): _rows(C(128, 64, 4, 2), C(128, 64, 4, 2), C(128, 64, 8, 2), C(128, 32, 8, 1), C(32, 32, 4, 1)),
        ("flash_bwd_dq", 4): _rows(C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2), C(32, 32, 4, 2), C(16, 16, 4, 2)),
        ("flash_bwd_dkdv", 2): _rows(C(64, 64, 4, 1), C(64, 64, 4, 1), C(32, 128, 8, 1), C(16, 64, 4, 2), C(16, 32, 8, 1)),
        ("flash_bwd_dkdv", 4): _rows(C(32, 64, 4, 2), C(16, 32, 4, 1), C(32, 32, 4, 1), C(16, 32, 8, 1), C(16, 16, 4, 1)),
        ("flash_bwd_dbias", 2): _rows(C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 32, 4, 2), C(32, 32, 4, 2)),
        ("flash_bwd_dbias", 4): _rows(C(32, 32, 4, 2), C(32, 32, 4, 2), C(32, 32, 4, 2), C(32, 16, 4, 2), C(16, 16, 4, 2)),
    },
}  # fmt: skip

# (architecture, element size, head-dim class): tiles for a backward in one pass, for few keys first.
_ONE_PASS = {
    **{("interpreter", itemsize, block_d): (C(32, 64),) for itemsize in (2, 4) for block_d in HEAD_DIM_CLASSES},
    ("sm_90", 2, 64): (C(32, 64, 4, 1), C(64, 128, 8, 1)),
}
