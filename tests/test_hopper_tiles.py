"""The tables of tiles of the Gluon kernels for Hopper: every entry fits the chip, and the choice among them is a good one."""

import heapq
import itertools
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tfkern import call, launch, tiles
from tfkern.backends import hopper

sys.path.append(str(Path(__file__).resolve().parent))
from gluonsim import cta
from hopper_cases import simulated

OF_A_PROGRAM, OF_A_MULTIPROCESSOR, RESERVED = 227 * 1024, 228 * 1024, 1024  # bytes of an H100's shared memory


def entries():
    """(kernel, head-dim class, tiles) of all tables."""
    for dim, table in tiles.HOPPER.items():
        configs = *table.usual, *table.heavy, table.single, table.masked
        yield from (("flash_fwd", dim, config) for config in dict.fromkeys(configs) if config)
        if table.short:
            yield "flash_fwd_short", dim, table.short
    for kernel, table in tiles.HOPPER_BACKWARD.items():
        for dim, found in table.items():
            yield from ((kernel, dim, config) for config in dict.fromkeys(found))
    for dim, configs in tiles.HOPPER_ONE_PASS.items():
        yield from (("flash_bwd", dim, config) for config in configs)


def put(kernel: str, dim: int, config, patch) -> None:
    """Let a kernel have these tiles and no others for a head-dim class."""
    if kernel == "flash_fwd":
        patch.setitem(tiles.HOPPER, dim, tiles.HopperTiles((config,), (config,), None, config, config))
    elif kernel == "flash_fwd_short":
        patch.setitem(tiles.HOPPER, dim, tiles.HOPPER[dim].alone(config, short=True))
    elif kernel == "flash_bwd":
        patch.setitem(tiles.HOPPER_ONE_PASS, dim, (config,))
    else:
        patch.delitem(tiles.HOPPER_ONE_PASS, dim, raising=False)
        patch.setitem(tiles.HOPPER_BACKWARD[kernel], dim, tiles.HopperBackwardTiles(config, config, config))


@contextmanager
def allocations():
    """Bytes of shared memory that each program of each launch allocates, while the block runs."""
    found = Counter()

    class Counted(cta.SharedAllocation):
        def __init__(self, machine, dtype, shape, *more):
            super().__init__(machine, dtype, shape, *more)
            found[machine] += self.data.nbytes

    with pytest.MonkeyPatch.context() as patch, simulated():
        patch.setattr(cta, "SharedAllocation", Counted)
        yield found


@pytest.mark.parametrize(("kernel", "dim", "config"), list(entries()), ids=lambda x: str(x) if isinstance(x, str | int) else "")
def test_every_entry_fits_the_chip(kernel, dim, config, monkeypatch):
    """With as many programs on a multiprocessor as it says."""
    put(kernel, dim, config, monkeypatch)
    monkeypatch.setattr(call, "_problems", {})  # they keep launches
    q = torch.randn(1, 1, 65, dim).bfloat16()
    problem, tensors = call.build(q, q, q)
    with allocations() as found:
        out, stats = hopper.forward(problem, tensors)
        if "bwd" in kernel:
            found.clear()
            hopper.backward(problem, tensors, out, stats, q, None, (True,) * 3 + (False,) * 3)
    programs = getattr(config, "programs", 1)
    assert 0 < max(found.values()) <= OF_A_PROGRAM
    assert programs * (max(found.values()) + RESERVED) <= OF_A_MULTIPROCESSOR


def played_out(load: tiles.HopperLoad, config: tiles.HopperConfig, short: bool) -> int:
    """Cycles until the last multiprocessor is done, tile by tile: each takes the next as soon as it is free. The estimate that
    chooses (HopperLoad.cycles) shares the work out evenly instead."""
    owned = tiles.HOPPER_QUERIES * (1 if short else config.consumers)
    outside, step = config.cycles
    ends = [min(start + owned, load.n_k) if load.causal else load.n_k for start in range(0, load.n_q, owned)]
    head = [outside + -(-end // config.block_n) * step for end in ends]
    if short:  # K and V of a head stay on a multiprocessor, whose consumers take turns; the first has most heads
        free = [0] * config.consumers
        work = head * load.group * -(-load.heads // load.group // load.multiprocessors)
    else:
        free = [0] * load.multiprocessors
        work = head[::-1] * load.heads
    for cycles in work:
        heapq.heapreplace(free, free[0] + cycles)
    return max(free)


LENGTHS = (65, 128, 197, 256, 384, 512, 577, 700, 1024, 2048)


@pytest.mark.parametrize("heavy", [False, True], ids=["plain", "heavy"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("n", LENGTHS)
def test_the_choice_is_nearly_the_best(n, causal, heavy):
    """Of what the table has, for problems that fill the chip three times over."""
    for (dim, table), heads in itertools.product(tiles.HOPPER.items(), (100, 132, 200, 384, 1000, 1536)):
        load = tiles.HopperLoad(heads, 1, n, n, causal, 132)
        if heads * -(-n // 128) < 3 * load.multiprocessors:
            continue
        possible = [(config, False) for config in (table.heavy if heavy else table.usual)]
        if table.short and n <= table.short.stages * table.short.block_n:
            possible.append((table.short, True))
        best = min(played_out(load, *each) for each in possible)
        chosen = table.fastest(load, heavy)
        assert chosen in possible
        assert played_out(load, *chosen) <= 1.15 * best, (dim, heads, chosen)


def test_keys_that_do_not_fit_do_not_stay():
    for table in tiles.HOPPER.values():
        for n_k in range(1, 2000, 37):
            config, short = table.fastest(tiles.HopperLoad(1536, 1, 512, n_k, False, 132))
            assert not short or n_k <= config.stages * config.block_n
            assert not table.fastest(tiles.HopperLoad(1536, 1, 512, n_k, False, 132), resident=False)[1]


def one_launch(batch=64, heads=1, kv_heads=1, n_q=128, head_dim=64) -> tiles.HopperOnePass | None:
    """The tiles of the backward in one launch of a problem, None where two are taken."""
    q, k = (torch.empty(1, 1, n_q, head_dim, dtype=torch.bfloat16).expand(batch, h, -1, -1) for h in (heads, kv_heads))
    return hopper.one_pass(call.build(q, k, k, enable_gqa=True)[0])


@pytest.mark.parametrize("group", [1, 2, 4, 5])
def test_one_launch_holds_every_query_of_a_key_head(group):
    """It takes the fewest tiles that do, and two launches where none does."""
    for n_q in (1, 64, 65, 128, 200, 384, 385, 512, 513, 1000):
        needed = group * -(-n_q // tiles.HOPPER_QUERIES)
        held = [config.tiles for config in tiles.HOPPER_ONE_PASS[64]]
        found = one_launch(n_q=n_q, heads=group)
        assert (found and found.tiles) == min((held for held in held if held >= needed), default=None)


def test_where_two_launches_are_taken(monkeypatch):
    """For head dims without tiles; on a chip that one launch would leave idle, or whose compiler spills in it."""
    for head_dim in (40, 64, 72, 128):
        assert bool(one_launch(head_dim=head_dim)) == (head_dim <= max(tiles.HOPPER_ONE_PASS))
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch, "triton_version", lambda: (3, 7))
    few, enough = (one_launch(batch=batch) for batch in (1, 132))
    assert enough
    assert not few
    monkeypatch.setattr(launch, "triton_version", lambda: tiles.HOPPER_ONE_PASS_SPILLS)
    assert not one_launch(batch=132)
