"""Print predicted times of the Hopper and the portable kernels on an H100, calibrated and with bands. Needs no GPU.

usage: python -m bench.static.hopper_model [--direction backward] [--length 197 512 …] [--head-dim 64]
                                            [--heads 12] [--tokens 32768] [--dtype bf16]

The Hopper kernels have two consumers whose products run while they exponentiate. The model adds these assumptions to those of
cost_model.py:
- A consumer by itself issues an instruction every `pace` cycles. Its products run meanwhile, one after the other, each from
  where the machine code issues it to where the machine code waits for it. So exponentials under a product cost the longer of
  the two times, not their sum.
- Two consumers slow each other only where a pipe is full. A pass takes the program the longest of these times: that of each
  consumer by itself, and that of both together on the tensor pipes, MUFU, or issue slots.
- The producer costs nothing and is always ahead, also with the next tile of queries: nothing waits for memory.
- The consumers of flash_fwd_short do not wait for each other. A program takes the sum of their times by themselves, divided by
  their number.
- Outside its loops over tiles, an item takes the instructions of the loop over items. The code before that loop runs once a
  program and is not counted.
- The first tile of an item, whose code is outside the loops over tiles, counts as one more pass of the last loop.
- The two kernels of the backward are not persistent: their programs also wait for memory twice, as in cost_model.py.
- The backward in one launch waits for memory once for each block of keys instead, while dV and dK are stored. Its gatherer
  counts as a third consumer.
"""

import argparse
import functools
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tfkern import tiles
from tfkern.bench import chips
from tfkern.bench.static import (
    aot,
    calibration,
    cost_model,
    geometry,
    hopper_gate,
    machine_code,
    model,
    sass,
    sweep,
)
from tfkern.ending import ended

WARPS = 4  # of one consumer
ARRIVED = cost_model.LATENCY["barriers"]  # cycles of a wait for an mbarrier that is complete already


def steady(body: list[machine_code.Instruction], machine: chips.Machine = chips.H100) -> float:
    """The cycles that one pass of a loop takes a consumer that has an SM to itself."""
    now = tensor = mufu = 0.0  # when the next instruction is issued, and when these pipes are free
    groups: list[float] = []  # when each group of wgmma in flight is done
    begun = 0.0
    for _ in range(4):  # the duration of a pass is constant by then
        begun = now
        for x in body:
            now += machine.pace
            if x.name == "HGMMA":
                tensor = max(tensor, now) + sass.wgmma_cycles(x) / machine.tensor
                groups += [tensor] if "gsb0" in x.operands else []
            elif x.opcode.startswith("WARPGROUP.DEPBAR"):
                done = len(groups) - int(x.operands.split("0x")[1], 16)
                now = max([now, *groups[: max(0, done)]]) + cost_model.LATENCY["wgmma waits"]
                groups = groups[max(0, done) :]
            elif x.name == "MUFU":
                now = max(now, mufu)
                mufu = now + sass.MUFU_CYCLES
            elif x.name == "SHFL":
                now += cost_model.LATENCY["shuffles"]
            elif x.opcode.startswith(("BAR.SYNC", "SYNCS.PHASECHK")):
                now += ARRIVED
    return now - begun


def loops_of(
    code: list[machine_code.Instruction], consumers: int, gatherer: bool = False, persistent: bool = True
) -> tuple[list[cost_model.Loop], float]:
    """Return (the loops over tiles, the instructions that one consumer issues for an item outside them). Each loop stands for
    all consumers of a program together.

    gatherer: the first loop in the code belongs to the gatherer, which runs beside every loop of the consumers. persistent: the
    code has a loop over items, and only that loop counts. Otherwise an item is a program, or in flash_bwd a block of keys, and
    all of the code counts.
    """
    inner = machine_code.loops(code, sass.MULTIPLY)
    beside, inner = inner[:gatherer], inner[gatherer:]
    kinds = len(inner) // consumers  # the code has the loops of one consumer after those of the other
    loops = []
    for kind in range(kinds):
        bodies = beside + inner[kind::kinds]
        busy = sum((Counter(sass.busy(body, WARPS, 0)) for body in bodies), Counter())
        loops.append(cost_model.Loop(dict(busy), max(map(steady, bodies))))
    if persistent:
        outside = 0
        for first in range(0, len(inner), kinds):
            own = inner[first : first + kinds]
            outside += len(machine_code.around(code, own[0])) - sum(map(len, own)) - len(own[-1])  # the first tile's code
        return loops, outside / consumers
    first_tile = sum(map(len, inner[kinds - 1 :: kinds]))
    return loops, (len(code) - sum(map(len, [*beside, *inner])) - first_tile) / (consumers + gatherer)


@functools.cache
def compiled(kernel: str, dtype: str, head_dim: int, config, variant: str) -> tuple[list[cost_model.Loop], float, int]:
    """Compile a kernel. Return (its loops over tiles, a consumer's instructions outside them, programs on an SM)."""
    source = hopper_gate.source(kernel, dtype, head_dim, config, variant)
    binary = aot.triton.compile(source, target=aot.TARGETS["sm_90"], options=config.options())
    found, gatherer = aot.resources(binary, "sm_90"), kernel == "flash_bwd"
    persistent = kernel.startswith("flash_fwd")
    loops, outside = loops_of(sweep.code_of(binary, "sm_90"), config.consumers, gatherer, persistent)
    return loops, outside, chips.H100.occupancy(found.registers, found.shared, WARPS * (1 + config.consumers + gatherer))


def launches(problem: geometry.Problem, direction: str) -> list[tuple[str, object]]:
    """(kernel, tiles) of each launch, for a problem that has more rows than one consumer owns and no heavy features. direction:
    forward, backward, or "backward in one launch". The last gives an empty list if the queries do not fit in shared memory."""
    p = problem
    if direction == "forward":
        load = tiles.HopperLoad(p.batch * p.heads, 1, p.length, p.length, p.causal, chips.H100.sms)
        config, short = tiles.HOPPER[p.head_dim].fastest(load)
        return [("flash_fwd_short" if short else "flash_fwd", config)]
    if direction == "backward":
        return [(kernel, table[p.head_dim].usual) for kernel, table in tiles.HOPPER_BACKWARD.items()]
    number = math.ceil(p.length / tiles.HOPPER_QUERIES)
    fitting = [config for config in tiles.HOPPER_ONE_PASS.get(p.head_dim, ()) if number <= config.tiles]
    return [("flash_bwd", config) for config in fitting[:1]]


def predict(problem: geometry.Problem, direction: str, dtype: str) -> list[cost_model.Prediction]:
    """The prediction of each launch, empty where the direction has no kernel. The times are uncalibrated and
    not to be shown: `estimate` calibrates them."""
    chosen = launches(problem, direction)
    if direction == "forward":
        return [predict_with(config, kernel == "flash_fwd_short", problem, dtype) for kernel, config in chosen]
    if direction == "backward":
        return [of_two(problem, dtype, kernel) for kernel, _ in chosen]
    return [one_launch(problem, dtype)] if chosen else []


def predict_with(config, short: bool, problem: geometry.Problem, dtype: str) -> cost_model.Prediction:
    """The uncalibrated prediction of the forward with given tiles, by flash_fwd, or by flash_fwd_short if `short`."""
    kernel = "flash_fwd_short" if short else "flash_fwd"
    loops, outside, occupancy = compiled(kernel, dtype, problem.head_dim, config, "causal" if problem.causal else "full")
    owned = tiles.HOPPER_QUERIES * (1 if short else config.consumers)
    work = geometry.work("flash_fwd", tiles.TileConfig(owned, config.block_n), problem)
    if short:
        work, loops, outside = _shared_out(work, loops, outside, config.consumers, problem)
    return cost_model.predict(work, loops, outside, occupancy, memory_waits=0)


def _shared_out(work: cost_model.Work, loops: list[cost_model.Loop], outside: float, consumers: int, p: geometry.Problem):
    """Return (work, loops, outside) of flash_fwd_short, whose programs share all queries of a head among their consumers."""
    heads = p.batch * p.heads
    loops = [cost_model.Loop({pipe: n / consumers for pipe, n in loop.busy.items()}, loop.alone / consumers) for loop in loops]
    alone = replace(work, programs=heads, longest=sum(work.passes) / heads, loaded=work.memory)
    return alone, loops, outside * work.programs / heads / consumers


def of_two(problem: geometry.Problem, dtype: str, kernel: str) -> cost_model.Prediction:
    """The uncalibrated prediction of one of the backward's two launches. kernel: flash_bwd_dq or flash_bwd_dkdv."""
    config = dict(launches(problem, "backward"))[kernel]
    found = compiled(kernel, dtype, problem.head_dim, config, "causal" if problem.causal else "full")
    rows = tiles.HOPPER_QUERIES * config.consumers
    of_keys = kernel == "flash_bwd_dkdv"
    owned = tiles.TileConfig(config.block_n, rows) if of_keys else tiles.TileConfig(rows, config.block_n)
    return cost_model.predict(geometry.work(kernel, owned, problem), *found)


def one_launch(problem: geometry.Problem, dtype: str) -> cost_model.Prediction | None:
    """The uncalibrated prediction of the backward in one launch. None if the queries do not fit in shared memory."""
    chosen = launches(problem, "backward in one launch")
    if not chosen:
        return None
    ((kernel, config),) = chosen
    loops, outside, occupancy = compiled(kernel, dtype, problem.head_dim, config, "causal" if problem.causal else "full")
    blocks = math.ceil(problem.length / (config.consumers * config.block_n))
    work = geometry.work_of_blocks(problem, tiles.HOPPER_QUERIES, config.consumers * config.block_n)
    return cost_model.predict(work, loops, outside * blocks, occupancy, memory_waits=blocks)


def way(problem: geometry.Problem, direction: str, triton: str) -> str:
    """The direction, as `launches` takes it, that the backend chooses with a Triton version: a backward in one launch or
    two."""
    clean = tuple(map(int, triton.split(".")[:2])) < tiles.HOPPER_ONE_PASS_SPILLS
    full = problem.batch * problem.heads >= tiles.HOPPER_FULL_CHIP
    one = "backward in one launch"
    return one if direction == "backward" and clean and full and launches(problem, one) else direction


def estimate(problem: geometry.Problem, direction: str, dtype: str) -> tuple[calibration.Estimate, str] | None:
    """Return (the calibrated estimate of all launches, the bounds of the launches joined by +). None where the direction has no
    kernel."""
    found = predict(problem, direction, dtype)
    if not found:
        return None
    raw = sum(x.microseconds for x in found)
    return calibration.estimate("hopper", direction, problem, raw), " + ".join(x.bound for x in found)


def row(problem: geometry.Problem, direction: str, dtype: str) -> list[str]:
    """The cells of a row of the table: the floor and the estimates of the portable and the Hopper kernels."""
    portable = model.estimate(problem, direction, dtype)
    cells = [f"{calibration.floor(problem, direction):.0f}", str(portable), portable.by]
    for way in WAYS[direction]:
        found = estimate(problem, way, dtype)
        cells += [str(found[0]), found[0].by, found[1]] if found else ["-"] * 3
    return cells


WAYS = {"forward": ["forward"], "backward": ["backward", "backward in one launch"]}
NAMES = {"forward": "Hopper", "backward": "two launches", "backward in one launch": "one launch"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--direction", choices=list(WAYS), default="forward")
    parser.add_argument("--length", nargs="+", type=int, default=[197, 512, 1024, 2048])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=sweep.HEADS)
    parser.add_argument("--tokens", type=int, default=sweep.TOKENS)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    args = parser.parse_args()
    dims = tiles.HOPPER if args.direction == "forward" else tiles.HOPPER_BACKWARD["flash_bwd_dq"]
    if args.head_dim not in dims:
        parser.error(f"--head-dim: the {args.direction} kernels for Hopper have {sorted(dims)}, not {args.head_dim}")
    columns = ["N", "", "floor µs", "portable µs", "by"]
    for way in WAYS[args.direction]:
        columns += [f"{NAMES[way]} µs", "by", "bound"]
    print(calibration.HEADING, end="\n\n")
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for n in args.length:
        for causal in (False, True):
            problem = geometry.Problem(max(1, args.tokens // n), args.heads, n, args.head_dim, causal)
            print(
                f"| {n} | {'causal' if causal else 'full'} | {' | '.join(row(problem, args.direction, args.dtype))} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
