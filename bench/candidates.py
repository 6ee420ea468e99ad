"""Tile sizes worth trying: all that rank.py ranks by the cost model, and the best, which tuning.py times. Plain data."""

import json
from pathlib import Path

RANKED = Path(__file__).with_name("ranked.json")  # written by rank.py
BEST = 4  # of each kernel and head dim

TILES = {  # (block_m, block_n) by kernel
    "flash_fwd": [(m, n) for m in (64, 128, 256) for n in (32, 64, 128)],
    "flash_bwd_dq": [(m, n) for m in (64, 128) for n in (32, 64, 128)],
    "flash_bwd_dkdv": [(m, n) for m in (32, 64, 128) for n in (64, 128)],
    "flash_bwd_one_pass": [(m, n) for m in (16, 32, 64) for n in (64, 128, 256)],
}

# Of kernels/hopper, as tfkern/tiles.py's HopperConfig: streamed rows, stages, consumers, whether they take turns, registers a
# thread, programs on a multiprocessor.
HOPPER = {
    "flash_fwd": [
        (128, 2, 2, True, 240, 1), (128, 2, 2, False, 240, 1), (128, 3, 2, True, 240, 1), (64, 2, 2, True, 240, 1),
        (64, 3, 3, False, 160, 1), (64, 2, 1, False, 216, 2),
    ],
    "flash_fwd_short": [(64, 11, 3, False, 160, 1), (64, 9, 3, False, 160, 1)],
    "flash_bwd_dq": [(64, 3, 2, False, 216, 1), (64, 4, 2, False, 216, 1), (64, 3, 1, False, 240, 1)],
    "flash_bwd": [(6, 2), (8, 1), (6, 1)],  # as HopperOnePass: slots for tiles of queries, buffers of dS
    "flash_bwd_dkdv": [(64, 3, 2, False, 232, 1), (64, 4, 2, False, 232, 1), (64, 3, 1, False, 240, 1)],
}  # fmt: skip


# (backend, kernel): what takes turns in tuning.py.
KERNELS = [("portable", kernel) for kernel in TILES] + [("hopper", kernel) for kernel in HOPPER]


def best(backend: str, kernel: str, head_dim: int) -> list[list]:
    """The numbers of the model's best, best first; none where a kernel has not been ranked."""
    return json.loads(RANKED.read_text())["best"].get(f"{backend} {kernel} {head_dim}", [])


def of(kernel: str) -> list[tuple[int, int, int, int]]:
    """(block_m, block_n, num_warps, num_stages) of every candidate for a kernel."""
    return [(m, n, warps, stages) for m, n in TILES[kernel] for warps in (4, 8) for stages in (1, 2, 3)]
