#!/usr/bin/env python3
"""Predicted times of the Hopper kernels beside the portable ones', on an H100 that need not be there.

usage: hopper_model.py [--direction backward] [--length 197 512 …] [--head-dim 64] [--heads 12] [--tokens 32768] [--dtype bf16]

To the assumptions of cost_model.py come, for two consumers whose products run while they exponentiate:
- A consumer by itself issues an instruction every `pace` cycles; its products run one after the other beside that, from where
  they are issued to where it waits for them, as the machine code has it. So exponentials under a product cost the longer of the
  two, not their sum.
- Two consumers disturb each other only where a pipe is full: a pass takes the program the longest of what each consumer takes
  by itself and of what both need of the tensor pipes, MUFU, or issue slots.
- The producer is free and always ahead, of the next tile of queries too: nothing waits for memory.
- Consumers of flash_fwd_short don't wait for each other: a program takes what each does by itself, shared out among them.
- Beside its loops an item takes what the loop over items has; what stands before that runs once a program and is not counted.
- The first tile of an item, which the kernel has outside of its loops, counts as one more pass of the last loop.
Of the backward, whose two kernels are not persistent, their programs also wait for memory twice, as cost_model.py has it. The
backward in one launch waits once for each block of keys instead, while the consumers' messages about dV and dK are taken away;
its gatherer counts as a third consumer.
"""

import argparse
import functools
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import aot
import compile_gate
import cost_model
import geometry
import hopper_gate
import machine_code
import model
import sass
import sweep

WARPS = 4  # of a consumer
ARRIVED = cost_model.LATENCY["barriers"]  # of a wait for an mbarrier that has completed


def steady(body: list[machine_code.Instruction], machine: cost_model.Machine = cost_model.H100) -> float:
    """Cycles of one pass of a loop by one consumer that has an SM to itself."""
    now = tensor = mufu = 0.0  # when the next instruction is issued, and when these pipes are free
    groups: list[float] = []  # when those in flight are done
    begun = 0.0
    for _ in range(4):  # by then every pass takes as long
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
    """(the loops over tiles, each of all consumers of a program together; what one of them issues for an item beside them).
    gatherer: the first loop is that of a partition that works beside the consumers, whichever of their loops they are in. Not
    persistent: an item is a program, or in flash_bwd a block of keys, all of whose code counts."""
    inner = machine_code.loops(code, sass.MULTIPLY)
    beside, inner = inner[:gatherer], inner[gatherer:]
    kinds = len(inner) // consumers  # the code has one consumer's loops behind the other's
    loops = []
    for kind in range(kinds):
        bodies = beside + inner[kind::kinds]
        busy = sum((Counter(sass.busy(body, WARPS, 0)) for body in bodies), Counter())
        loops.append(cost_model.Loop(dict(busy), max(map(steady, bodies))))
    if persistent:
        outside = 0
        for first in range(0, len(inner), kinds):
            own = inner[first : first + kinds]
            outside += len(machine_code.around(code, own[0])) - sum(map(len, own)) - len(own[-1])  # which the first tile takes
        return loops, outside / consumers
    first_tile = sum(map(len, inner[kinds - 1 :: kinds]))
    return loops, (len(code) - sum(map(len, [*beside, *inner])) - first_tile) / (consumers + gatherer)


@functools.cache
def compiled(kernel: str, dtype: str, head_dim: int, config, variant: str) -> tuple[list[cost_model.Loop], float, int]:
    """(loops, cycles beside them, programs that an SM holds) of a kernel."""
    source = hopper_gate.source(kernel, dtype, head_dim, config, variant)
    binary = aot.triton.compile(source, target=aot.TARGETS["sm_90"], options=config.options())
    found, gatherer = aot.resources(binary, "sm_90"), kernel == "flash_bwd"
    persistent = kernel.startswith("flash_fwd")
    loops, outside = loops_of(sweep.code_of(binary, "sm_90"), config.consumers, gatherer, persistent)
    return loops, outside, cost_model.H100.occupancy(found.registers, found.shared, WARPS * (1 + config.consumers + gatherer))


def predict(problem: geometry.Problem, dtype: str) -> cost_model.Prediction:
    """Of the forward's launch, of a problem for more queries than one consumer owns and without heavy features."""
    tiles, p = compile_gate.load("tfkern.tiles"), problem
    load = tiles.HopperLoad(p.batch * p.heads, 1, p.length, p.length, p.causal, cost_model.H100.sms)
    config, short = tiles.HOPPER[p.head_dim].fastest(load)
    return predict_with(config, short, problem, dtype)


def predict_with(config, short: bool, problem: geometry.Problem, dtype: str) -> cost_model.Prediction:
    """The same with given tiles; short: by flash_fwd_short."""
    tiles, kernel = compile_gate.load("tfkern.tiles"), "flash_fwd_short" if short else "flash_fwd"
    loops, outside, occupancy = compiled(kernel, dtype, problem.head_dim, config, "causal" if problem.causal else "full")
    owned = tiles.HOPPER_QUERIES * (1 if short else config.consumers)
    work = geometry.work("flash_fwd", tiles.TileConfig(owned, config.block_n), problem)
    if short:
        work, loops, outside = _shared_out(work, loops, outside, config.consumers, problem)
    return cost_model.predict(work, loops, outside, occupancy, memory_waits=0)


def _shared_out(work: cost_model.Work, loops: list[cost_model.Loop], outside: float, consumers: int, p: geometry.Problem):
    """(work, loops, outside) of flash_fwd_short, in which a program has all queries of a head, and each consumer its share."""
    heads = p.batch * p.heads
    loops = [cost_model.Loop({pipe: n / consumers for pipe, n in loop.busy.items()}, loop.alone / consumers) for loop in loops]
    alone = replace(work, programs=heads, longest=sum(work.passes) / heads, loaded=work.memory)
    return alone, loops, outside * work.programs / heads / consumers


def of_two(problem: geometry.Problem, dtype: str, kernel: str) -> cost_model.Prediction:
    """Of one of the backward's two launches, with the tiles for more rows than one consumer owns and no heavy features."""
    tiles = compile_gate.load("tfkern.tiles")
    config = tiles.HOPPER_BACKWARD[kernel][problem.head_dim].usual
    found = compiled(kernel, dtype, problem.head_dim, config, "causal" if problem.causal else "full")
    rows = tiles.HOPPER_QUERIES * config.consumers
    of_keys = kernel == "flash_bwd_dkdv"
    owned = tiles.TileConfig(config.block_n, rows) if of_keys else tiles.TileConfig(rows, config.block_n)
    return cost_model.predict(geometry.work(kernel, owned, problem), *found)


def one_launch(problem: geometry.Problem, dtype: str) -> cost_model.Prediction | None:
    """Of the backward in one launch, if it has memory for the queries."""
    tiles = compile_gate.load("tfkern.tiles")
    number = math.ceil(problem.length / tiles.HOPPER_QUERIES)
    configs = tiles.HOPPER_ONE_PASS.get(problem.head_dim, ())
    config = next((config for config in configs if number <= config.tiles), None)
    if config is None:
        return None
    found = compiled("flash_bwd", dtype, problem.head_dim, config, "causal" if problem.causal else "full")
    loops, outside, occupancy = found
    blocks = math.ceil(problem.length / (config.consumers * config.block_n))
    work = geometry.work_of_blocks(problem, tiles.HOPPER_QUERIES, config.consumers * config.block_n)
    return cost_model.predict(work, loops, outside * blocks, occupancy, memory_waits=blocks)


def _forward(problem: geometry.Problem, dtype: str) -> str:
    """The end of a row."""
    portable = model.predict(problem, "forward", dtype)["microseconds"]
    found, floor = predict(problem, dtype), geometry.floor("flash_fwd", problem)
    flops = 4 * problem.scores * problem.head_dim / found.microseconds / 1e6
    return (
        f"{floor:.0f} | {portable:.0f} | {floor / portable:.0%} "
        f"| {found.microseconds:.0f} | {found.bound} | {floor / found.microseconds:.0%} | {flops:.0f}"
    )


def _backward(problem: geometry.Problem, dtype: str) -> str:
    """The end of a row."""
    portable = model.predict(problem, "backward", dtype)["microseconds"]
    two = [of_two(problem, dtype, kernel) for kernel in ("flash_bwd_dq", "flash_bwd_dkdv")]
    one, floor = one_launch(problem, dtype), geometry.floor("flash_bwd_one_pass", problem)
    best = min(sum(x.microseconds for x in two), one.microseconds if one else math.inf)
    flops = 10 * problem.scores * problem.head_dim / best / 1e6
    last = f"{one.microseconds:.0f} | {one.bound}" if one else "- | -"
    times, bounds = " + ".join(f"{x.microseconds:.0f}" for x in two), " + ".join(x.bound for x in two)
    return f"{floor:.0f} | {portable:.0f} | {times} | {bounds} | {last} | {floor / best:.0%} | {flops:.0f}"


COLUMNS = {
    "forward": ["floor µs", "portable µs", "of the floor", "Hopper µs", "bound", "of the floor", "TFLOP/s"],
    "backward": [
        "floor µs",
        "portable µs",
        "two launches µs",
        "bound",
        "one launch µs",
        "bound",
        "better of the floor",
        "TFLOP/s",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--direction", choices=list(COLUMNS), default="forward")
    parser.add_argument("--length", nargs="+", type=int, default=[197, 512, 1024, 2048])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=sweep.HEADS)
    parser.add_argument("--tokens", type=int, default=sweep.TOKENS)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    args = parser.parse_args()
    columns = ["N", "", *COLUMNS[args.direction]]
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    row = _forward if args.direction == "forward" else _backward
    for n in args.length:
        for causal in (False, True):
            problem = geometry.Problem(max(1, args.tokens // n), args.heads, n, args.head_dim, causal)
            print(f"| {n} | {'causal' if causal else 'full'} | {row(problem, args.dtype)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
