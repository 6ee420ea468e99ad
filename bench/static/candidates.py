"""Candidates for tile sizes: all that rank.py ranks by the cost model, and the best, which bench/gpu/tuning.py times."""

import json
from pathlib import Path

RANKED = Path(__file__).with_name("ranked.json")  # written by rank.py
BEST = 4  # how many of each kernel and head dim are kept

# (rows that a program owns, rows that it goes through at a time, warps) by kernel. Most have 16 rows a warp, as a
# matrix instruction of one warp has, or 32.
TILES = {
    "flash_fwd": [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8)],
    "flash_bwd_dq": [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8), (128, 64, 8)],
    "flash_bwd_dkdv": [(64, 16, 4), (64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 32, 8), (128, 64, 8)],
    "flash_bwd_dbias": [(32, 32, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8)],
    "flash_bwd_one_pass": [(keys, m, warps) for m in (16, 32, 64) for keys in (64, 128, 256) for warps in (4, 8)],
}
# Further candidates for head dim 256, whose sums take the registers of more warps.
TILES_256 = {
    "flash_bwd_dq": [(32, 32, 4), (64, 32, 8), (64, 64, 8)],
    "flash_bwd_dkdv": [(32, 16, 4), (32, 32, 4), (64, 16, 8), (64, 32, 8)],
    "flash_bwd_dbias": [(32, 16, 4)],
}
# The candidates of all kernels for float32, which has no matrix instructions: each thread has a square of products.
TILES_FP32 = [
    (16, 16, 4), (32, 16, 4), (32, 16, 8), (32, 32, 4), (64, 16, 4), (64, 32, 4), (64, 32, 8), (64, 64, 4), (64, 64, 8),
    (128, 32, 4), (128, 32, 8),
]  # fmt: skip
STAGES = (1, 2, 3)
OWNS_KEYS = ("flash_bwd_dkdv", "flash_bwd_one_pass")  # the others own queries
SUMS = {"flash_bwd_dkdv": 2, "flash_bwd_one_pass": 2, "flash_bwd_dbias": 0}  # of owned rows by head dim, in fp32; others: 1
MAX_NUMBERS = 192  # a thread, of those sums and two tiles of scores
MAX_SHARED = 227 * 1024  # bytes a program, on the chip that has the most

# The candidates of kernels/hopper, as arguments of HopperConfig in tfkern/tiles.py: streamed rows, stages, consumers, whether
# these take turns, registers a thread, programs on a multiprocessor.
HOPPER = {
    "flash_fwd": [
        (128, 2, 2, True, 240, 1), (128, 2, 2, False, 240, 1), (128, 3, 2, True, 240, 1), (64, 2, 2, True, 240, 1),
        (64, 3, 3, False, 160, 1), (64, 2, 1, False, 216, 2),
    ],
    "flash_fwd_short": [(64, 11, 3, False, 160, 1), (64, 9, 3, False, 160, 1)],
    "flash_bwd_dq": [(64, 3, 2, False, 216, 1), (64, 4, 2, False, 216, 1), (64, 3, 1, False, 240, 1)],
    "flash_bwd": [(6, 2), (8, 1), (6, 1)],  # arguments of HopperOnePass: slots for tiles of queries, buffers of dS
    "flash_bwd_dkdv": [(64, 3, 2, False, 232, 1), (64, 4, 2, False, 232, 1), (64, 3, 1, False, 240, 1)],
}  # fmt: skip


# (block_m, block_n, num_warps, num_stages) for the kernel that rank.py does not rank: dK and dV with descriptors
# (DESCRIPTOR_TABLE in tfkern/tiles.py).
UNRANKED = {"flash_bwd_dkdv_described": [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2)]}
# (backend, kernel) of all that tuning.py times, in turn. The gradient of a bias is not among them.
KERNELS = [("portable", kernel) for kernel in (*TILES, *UNRANKED) if kernel != "flash_bwd_dbias"]
KERNELS += [("hopper", kernel) for kernel in HOPPER]


def best(backend: str, kernel: str, head_dim: int) -> list[list]:
    """The best tiles of a kernel by the cost model, best first, as the arguments of its class in tfkern/tiles.py. Without a
    ranking: those of UNRANKED, or the first BEST candidates, for a portable kernel with two stages."""
    if kernel in UNRANKED:
        return UNRANKED[kernel]
    ranked = json.loads(RANKED.read_text())["best"].get(f"{backend} {kernel} {head_dim}")
    listed = HOPPER[kernel] if backend == "hopper" else [tiles for tiles in of(kernel, head_dim) if tiles[3] == 2]
    return ranked or listed[:BEST]


def of(kernel: str, head_dim: int = 64, size: int = 2) -> list[tuple[int, int, int, int]]:
    """(block_m, block_n, num_warps, num_stages) of each candidate for a portable kernel on elements of `size` bytes."""
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
    """How many numbers a program holds in registers at least: its sums and two tiles of scores."""
    return SUMS.get(kernel, 1) * rows * head_dim + 2 * rows * step


def _operands(rows: int, step: int, head_dim: int, size: int) -> int:
    """The bytes of the tiles of Q, dO, K and V that flash_bwd_dbias multiplies. All four pass through shared memory."""
    return 2 * (rows + step) * head_dim * size
