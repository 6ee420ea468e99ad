"""Tile sizes worth trying: all that rank.py ranks by the cost model, and the best, which tuning.py times. Plain data."""

import json
from pathlib import Path

RANKED = Path(__file__).with_name("ranked.json")  # written by rank.py
BEST = 4  # of each kernel and head dim

# (rows that a program owns, rows that it goes through at a time, warps) by kernel: 16 rows a warp, as many as a matrix
# instruction of one warp has, or 32.
TILES = {
    "flash_fwd": [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8)],
    "flash_bwd_dq": [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8), (128, 64, 8)],
    "flash_bwd_dkdv": [(64, 16, 4), (64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 32, 8), (128, 64, 8)],
    "flash_bwd_dbias": [(32, 32, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8)],
    "flash_bwd_one_pass": [(keys, m, warps) for m in (16, 32, 64) for keys in (64, 128, 256) for warps in (4, 8)],
}
# Sums of 256 columns take more warps' registers.
TILES_256 = {
    "flash_bwd_dq": [(32, 32, 4), (64, 32, 8), (64, 64, 8)],
    "flash_bwd_dkdv": [(32, 16, 4), (32, 32, 4), (64, 16, 8), (64, 32, 8)],
    "flash_bwd_dbias": [(32, 16, 4)],
}
# Of float32, which has no matrix instructions: a thread has a square of products.
TILES_FP32 = [
    (16, 16, 4), (32, 16, 4), (32, 16, 8), (32, 32, 4), (64, 16, 4), (64, 32, 4), (64, 32, 8), (64, 64, 4), (64, 64, 8),
    (128, 32, 4), (128, 32, 8),
]  # fmt: skip
STAGES = (1, 2, 3)
OWNS_KEYS = ("flash_bwd_dkdv", "flash_bwd_one_pass")  # the others own queries
SUMS = {"flash_bwd_dkdv": 2, "flash_bwd_one_pass": 2, "flash_bwd_dbias": 0}  # of owned rows by head dim, in fp32; others 1
MAX_NUMBERS = 192  # of those sums and two tiles of scores, a thread
MAX_SHARED = 227 * 1024  # bytes a program, of the chip that has most

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


# As TILES, with stages, of what rank.py does not know: dK and dV with descriptors (DESCRIPTOR_TABLE in tfkern/tiles.py).
UNRANKED = {"flash_bwd_dkdv_described": [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2)]}
# (backend, kernel): what takes turns in tuning.py. Of the gradient of a bias nothing is timed.
KERNELS = [("portable", kernel) for kernel in (*TILES, *UNRANKED) if kernel != "flash_bwd_dbias"]
KERNELS += [("hopper", kernel) for kernel in HOPPER]


def best(backend: str, kernel: str, head_dim: int) -> list[list]:
    """The numbers of the model's best, best first; of a kernel that was not ranked the first that are here, with two stages."""
    if kernel in UNRANKED:
        return UNRANKED[kernel]
    ranked = json.loads(RANKED.read_text())["best"].get(f"{backend} {kernel} {head_dim}")
    listed = HOPPER[kernel] if backend == "hopper" else [tiles for tiles in of(kernel, head_dim) if tiles[3] == 2]
    return ranked or listed[:BEST]


def of(kernel: str, head_dim: int = 64, size: int = 2) -> list[tuple[int, int, int, int]]:
    """(block_m, block_n, num_warps, num_stages) of every candidate for a kernel, whose elements have `size` bytes."""
    found = TILES[kernel] if size == 2 else TILES_FP32
    if head_dim == 256 and size == 2:
        found = found + TILES_256.get(kernel, [])
    return [
        (*((step, rows) if kernel in OWNS_KEYS else (rows, step)), warps, stages)
        for rows, step, warps in found
        if _numbers(kernel, rows, step, head_dim) <= MAX_NUMBERS * 32 * warps
        and (kernel != "flash_bwd_dbias" or _operands(rows, step, head_dim, size) <= MAX_SHARED)
        for stages in STAGES
    ]


def _numbers(kernel: str, rows: int, step: int, head_dim: int) -> int:
    """That a program holds in registers at least."""
    return SUMS.get(kernel, 1) * rows * head_dim + 2 * rows * step


def _operands(rows: int, step: int, head_dim: int, size: int) -> int:
    """Bytes of the tiles of Q, dO, K and V that flash_bwd_dbias multiplies; all four pass through shared memory."""
    return 2 * (rows + step) * head_dim * size
