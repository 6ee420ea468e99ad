"""Which tile sizes a launch takes (tiles.py has them): by architecture, kernel, element size, head dim, and what is there."""

import contextlib

from tfkern.tiles import DESCRIPTOR_TABLE, INTERPRETER, KERNELS, ONE_PASS_TABLE, SERVED_BY, TABLE, TileConfig

ONE_PASS = "flash_bwd_one_pass"
DESCRIBED = "flash_bwd_dkdv_described"
FIRST_WITH_TMA = 90
FULL_CHIP = 128  # programs; an H100 has 132 SMs

# Of the whole process, not of a context: autograd runs backwards of GPU tensors in threads of its own.
_overrides: dict[str, TileConfig | None] = {}


def head_dim_class(head_dim: int) -> int:
    """The padded head dim that kernels compute with: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_config(arch: str, kernel: str, itemsize: int, block_d: int, heavy: bool = False) -> TileConfig:
    """The tiles for one launch. arch is "sm_NN", "gfx…" or "interpreter"; block_d a head-dim class; itemsize 2 or 4 bytes;
    `heavy` where scores go through more than a band: a mask, a bias, dropout, softcap, ALiBi or a score_mod; or where the last
    dim is not dense."""
    if kernel in _overrides:
        return _overrides[kernel]
    if arch == "interpreter":
        return INTERPRETER[kernel]
    config = TABLE[table_arch(arch)][kernel, itemsize][block_d]
    return config.lighter(kernel, block_d) if heavy else config


def table_arch(arch: str) -> str:
    """The architecture whose rows serve `arch`. A chip that nobody has thought of gets those of sm_86, which need the least
    shared memory: 99 KiB."""
    if arch.startswith("gfx"):
        return "gfx942"
    return SERVED_BY.get(arch, "sm_86")


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
    return list(ONE_PASS_TABLE.get((arch if arch == "interpreter" else table_arch(arch), itemsize, block_d), ()))


def described(arch: str, itemsize: int, block_d: int) -> TileConfig | None:
    """The tiles of flash_bwd_dkdv where descriptors bring its queries; None where pointers are better, where the device has no
    TMA, or for other than 16-bit numbers. Arguments as for tile_config."""
    if itemsize != 2 or not (arch == "interpreter" or (arch.startswith("sm_") and int(arch[3:]) >= FIRST_WITH_TMA)):
        return None
    if DESCRIBED in _overrides:
        return _overrides[DESCRIBED]
    return None if "flash_bwd_dkdv" in _overrides else DESCRIPTOR_TABLE.get((arch, itemsize, block_d))


@contextlib.contextmanager
def override(**configs: TileConfig | None):
    """Within the block, in all threads, the kernels named by keyword use the given tiles:
    `with override(flash_fwd=TileConfig(32, 16)): …`. flash_bwd_one_pass are the tiles of a backward in one pass, taken whenever
    they hold all keys, flash_bwd_dkdv_described those with descriptors; None for never."""
    if unknown := configs.keys() - {*KERNELS, ONE_PASS, DESCRIBED}:
        raise ValueError(f"no kernel is called {sorted(unknown)}; the kernels are {(*KERNELS, ONE_PASS, DESCRIBED)}")
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
