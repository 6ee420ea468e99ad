"""The work of the launches of one attention, for cost_model.py: programs, passes of inner loops, bytes; and the floor."""

import math
from typing import NamedTuple

from tfkern.bench import chips
from tfkern.bench.static import cost_model

OWNS_KEYS = ("flash_bwd_dkdv", "flash_bwd_dkdv_described", "flash_bwd_one_pass")
PRODUCTS = {"flash_fwd": 2, "flash_bwd_dq": 3, "flash_bwd_dkdv": 4, "flash_bwd_one_pass": 5, "flash_bwd_dbias": 2}
TENSORS = {  # tensors that are read or written once, besides a bias
    "flash_fwd": 4, "flash_bwd_dq": 6, "flash_bwd_dkdv": 6, "flash_bwd_one_pass": 7, "flash_bwd_dbias": 4,
}  # fmt: skip
for counts in (PRODUCTS, TENSORS):
    counts["flash_bwd_dkdv_described"] = counts["flash_bwd_dkdv"]


class Problem(NamedTuple):
    """A self-attention on numbers of `size` bytes. length: the number of queries, and of keys."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool
    size: int = 2

    @property
    def scores(self) -> float:
        return self.batch * self.heads * self.length**2 * (0.5 if self.causal else 1.0)

    @property
    def tensor(self) -> float:
        """The bytes of one of the tensors q, k, v, …"""
        return float(self.size * self.batch * self.heads * self.length * self.head_dim)


def _passes(kernel: str, p: Problem, owned: int, step: int, start: int) -> tuple[int, int, int]:
    """Return how many tiles (cut on the left, whole, cut on the right) a program goes through. It owns `owned` rows from
    `start` on, and a tile has `step` rows. `parts` in kernels/band.py has the geometry."""
    n = p.length
    if not p.causal or kernel == "flash_bwd_one_pass":
        whole = n // step
        return (0, whole, int(n % step > 0)) if not p.causal else (whole, 0, int(n % step > 0))
    if kernel in OWNS_KEYS:  # the queries from the owned tile's first key on
        edge = min(math.ceil((min(owned, n - start) - 1) / step), math.ceil((n - start) / step))
        rest = max(0, n - start - edge * step)
        return edge, rest // step, int(rest % step > 0)
    whole = (start + 1) // step  # the keys up to the owned tile's last query
    return 0, whole, math.ceil(min(start + owned, n) / step) - whole


def _tile(kernel: str, config) -> tuple[int, int]:
    """Return (rows that a program owns, rows that it goes through at a time)."""
    return (config.block_n, config.block_m) if kernel in OWNS_KEYS else (config.block_m, config.block_n)


def multiply_adds(kernel: str, config, head_dim: int) -> float:
    """The multiply-adds of one pass on sm_100, where a product of 64 rows takes as long as one of 128."""
    owned, step = _tile(kernel, config)
    return PRODUCTS[kernel] * max(128, owned) * step * head_dim


def work(kernel: str, config, p: Problem) -> cost_model.Work:
    """The work of one launch. config: the kernel's tiles."""
    if kernel == "flash_bwd_dbias":
        return _work_of_bias(config, p)
    owned, step = _tile(kernel, config)
    each = [_passes(kernel, p, owned, step, start) for start in range(0, p.length, owned)]
    heads = p.batch * p.heads
    totals = [heads * sum(column) for column in zip(*each, strict=True)]
    if not (p.causal and kernel in OWNS_KEYS):  # the kernel has no loop for tiles cut on the left
        totals = totals[1:]
    row, programs = p.size * p.head_dim, heads * len(each)
    loaded = sum(totals) * (3 if kernel == "flash_bwd_one_pass" else 2) * step * row + programs * 2 * owned * row
    return cost_model.Work(programs, tuple(totals), loaded, TENSORS[kernel] * p.tensor, max(map(sum, each)))


def _work_of_bias(config, p: Problem) -> cost_model.Work:
    """The work of flash_bwd_dbias with a bias (1, heads, N, N). A program owns a tile of the bias and makes one pass for each
    batch."""
    m, n = config.block_m, config.block_n
    tiles = [(i, j) for i in range(0, p.length, m) for j in range(0, p.length, n)]
    seen = sum(not p.causal or j < min(i + m, p.length) for i, j in tiles)
    passes = p.heads * seen * p.batch
    bias = p.size * p.heads * p.length**2
    loaded = passes * ((2 * m + 2 * n) * p.size * p.head_dim + m * n * p.size)
    return cost_model.Work(p.heads * len(tiles), (passes,), loaded, TENSORS["flash_bwd_dbias"] * p.tensor + 2.0 * bias, p.batch)


def work_of_blocks(p: Problem, step: int, block: int) -> cost_model.Work:
    """The work of the Hopper backward in one launch. A program has one head. For each block of `block` keys it goes through
    tiles of `step` queries. With a causal mask its loops are for tiles cut on the left, whole tiles, and tiles cut on the
    right. Without one they are for whole tiles and for masked ones, to which the first tile of each block belongs."""
    n, tiles = p.length, math.ceil(p.length / step)
    cut_left = whole = cut = 0
    for start in range(0, n, block):
        if start + block > n:  # the block has fewer keys, so all its tiles are masked
            cut += tiles - (start // step if p.causal else 0)
        elif p.causal:
            cut_left += block // step
            whole += n // step - (start + block) // step
            cut += int(n % step > 0)
        else:
            whole += n // step - 1
            cut += 1 + int(n % step > 0)
    row, heads = p.size * p.head_dim, p.batch * p.heads
    passes = [cut_left, whole, cut] if p.causal else [whole, cut]
    loaded = heads * row * (sum(passes) * 2 * step + 2 * math.ceil(n / block) * block + tiles * step)
    # one tensor more than flash_bwd_one_pass: O, from which the kernel computes delta
    return cost_model.Work(
        heads, tuple(heads * x for x in passes), loaded, (TENSORS["flash_bwd_one_pass"] + 1) * p.tensor, sum(passes)
    )


def floor(kernel: str, p: Problem, machine: chips.Machine = chips.H100) -> float:
    """The least microseconds of one launch, by its matrix products, exponentials and bytes to and from memory."""
    return chips.floor(2.0 * PRODUCTS[kernel] * p.scores * p.head_dim, p.scores, TENSORS[kernel] * p.tensor, machine)
