"""key_range, query_range and visible against brute force, over all small problems."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from tfkern import interpreter
from tfkern.kernels import band
from tfkern.kernels.features import Dropout, Features

MAX_Q, MAX_K = 4, 6
SIDES = range(4)


@triton.jit
def _ranges(
    START, END, N_Q, N_K, SHIFT, LEFTS, RIGHTS, OUT, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, QUERIES: tl.constexpr, F,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    start, end, n_q, n_k, shift = (
        tl.load(START + i), tl.load(END + i), tl.load(N_Q + i), tl.load(N_K + i), tl.load(SHIFT + i),
    )  # fmt: skip
    left = tl.load(LEFTS + i) if HAS_LEFT else None
    right = tl.load(RIGHTS + i) if HAS_RIGHT else None
    if QUERIES:
        lo, full_lo, full_hi, hi = band.query_range(start, end, n_q, shift, left, right, F, BLOCK)
    else:
        lo, full_lo, full_hi, hi = band.key_range(start, end, n_k, shift, left, right, F, BLOCK)
    zero = tl.zeros([COUNT], tl.int32)
    tl.store(OUT + i, lo + zero)
    tl.store(OUT + COUNT + i, full_lo + zero)
    tl.store(OUT + 2 * COUNT + i, full_hi + zero)
    tl.store(OUT + 3 * COUNT + i, hi + zero)
    tl.store(OUT + 4 * COUNT + i, band.first_tile(lo, F, BLOCK) + zero)


def problems(has_left: bool, has_right: bool, queries: bool) -> torch.Tensor:
    """(K, 7): start, end, n_q, n_k, shift, left, right for every small problem and every tile of its rows."""
    rows = []
    for n_q, n_k in itertools.product(range(1, MAX_Q + 1), range(MAX_K + 1)):
        count = n_k if queries else n_q
        tiles = [(s, min(s + size, count)) for size in (1, 2, 3) for s in range(0, count, size)]
        for (start, end), shift in itertools.product(tiles, {0, n_k - n_q}):
            for left, right in itertools.product(SIDES if has_left else [0], SIDES if has_right else [0]):
                rows.append((start, end, n_q, n_k, shift, left, right))
    return torch.tensor(rows, dtype=torch.int32)


def seen(p: torch.Tensor, has_left: bool, has_right: bool) -> torch.Tensor:
    """(K, MAX_Q, MAX_K): which query sees which key, from the definition."""
    _, _, n_q, n_k, shift, left, right = (p[:, c, None, None] for c in range(7))
    i, j = torch.arange(MAX_Q)[:, None], torch.arange(MAX_K)[None, :]
    keep = (i < n_q) & (j < n_k)
    if has_left:
        keep = keep & (j >= i + shift - left)
    if has_right:
        keep = keep & (j <= i + shift + right)
    return keep


def run_ranges(p, block, has_left, has_right, queries, aligned, device):
    count = triton.next_power_of_2(len(p))
    columns = torch.cat([p, p[:1].expand(count - len(p), -1)]).T.contiguous().to(device)
    out = torch.empty(5, count, dtype=torch.int32, device=device)
    there = Features(dropout=Dropout(columns, 3, 1.0) if aligned else None)
    args = (*columns, out, count, block, has_left, has_right, queries, there)
    if device == "cpu":
        interpreter.run(_ranges, 1, args, {})
    else:
        _ranges[(1,)](*args)
    return out[:, : len(p)].cpu().long()


@pytest.mark.parametrize("queries", [False, True], ids=["key_range", "query_range"])
@pytest.mark.parametrize("sides", list(itertools.product([False, True], repeat=2)), ids=["full", "right", "left", "both"])
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("aligned", [False, True], ids=["from-lo", "aligned"])
def test_ranges(aligned, block, sides, queries, device):
    p = problems(*sides, queries)
    lo, full_lo, full_hi, hi, first = run_ranges(p, block, *sides, queries, aligned, device)
    keep = seen(p, *sides)  # [problem, query, key]
    if queries:
        keep = keep.mT  # [problem, key, query]: the tile's rows are keys, and what is streamed past them queries
    rows = torch.arange(keep.shape[1])
    in_tile = (rows >= p[:, :1]) & (rows < p[:, 1:2])
    some = (keep & in_tile[:, :, None]).any(1)
    every = (keep | ~in_tile[:, :, None]).all(1)
    at = torch.arange(keep.shape[2])
    # [lo, hi) holds exactly what some row sees: in a band that has no gaps
    assert torch.equal(some, (at >= lo[:, None]) & (at < hi[:, None]))
    # tiles begin at lo, or at the multiple of their size before it
    assert torch.equal(first, lo - lo % block if aligned else lo)
    # full tiles lie on their grid, in order
    assert ((full_lo >= lo) & (full_hi >= full_lo) & (full_lo >= 0)).all()
    assert (((full_lo - first) % block == 0) & ((full_hi - full_lo) % block == 0)).all()
    # a tile of the grid is in the full range exactly if it is whole and all of its elements are seen by every row
    for tile in range(-(-keep.shape[2] // block) + 1):
        start = first + tile * block
        inside = torch.stack([start + o for o in range(block)], 1)
        known = inside < keep.shape[2]
        whole = (known & every.gather(1, inside.clamp(max=keep.shape[2] - 1))).all(1)
        in_range = (start >= full_lo) & (start < full_hi)
        relevant = start < hi
        assert torch.equal(in_range[relevant], whole[relevant])
        assert not in_range[~relevant].any()


def test_brute_force_is_not_trivial():
    p = problems(True, True, False)
    assert len(p) > 1000
    keep = seen(p, True, True)
    assert keep.any()
    assert not keep.flatten(1).any(1).all()  # some see nothing at all


@triton.jit
def _all_tiles(FULL_LO, FULL_HI, OUT, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, COUNT)
    first, lo, hi, last = band.all_tiles(tl.load(FULL_LO + i), tl.load(FULL_HI + i), 77, BLOCK)
    tl.store(OUT + i, lo)
    tl.store(OUT + COUNT + i, hi)
    tl.store(OUT + 2 * COUNT + i, first + last + tl.zeros([COUNT], tl.int32))


@pytest.mark.parametrize("block", [1, 4])
def test_ranges_of_all_tiles(block, device):
    """The whole tiles of a grid from 0 that lie in a range, and no other."""
    pairs = [(lo, hi) for lo in range(16) for hi in range(lo, 16)]
    pairs += [(0, 0)] * (-len(pairs) % 256)
    full_lo, full_hi = torch.tensor(pairs, dtype=torch.int32, device=device).T.contiguous()
    out = torch.empty(3, len(pairs), dtype=torch.int32, device=device)
    arguments = (full_lo, full_hi, out, len(pairs), block)
    if interpreter.interpreting():
        interpreter.run(_all_tiles, 1, arguments, {})
    else:
        _all_tiles[(1,)](*arguments)
    assert (out[2] == 77).all()
    for (lo, hi), found_lo, found_hi in zip(pairs, *out[:2].tolist(), strict=True):
        whole = [tile for tile in range(0, 16, block) if lo <= tile and tile + block <= hi]
        assert list(range(found_lo, found_hi, block)) == whole, (lo, hi)
        assert found_lo % block == 0 <= found_lo <= found_hi
