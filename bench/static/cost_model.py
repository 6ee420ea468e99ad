"""Predict the time of a compiled kernel on a GPU that need not be there, and the pipe that bounds it.

The times are for ranking tiles. As absolute times they are wrong by up to a factor of 2 for Hopper, so calibration.py corrects
the times that are shown. Assumptions, to be corrected by measurements (`tfkern bench model --against results.json`):
- bench/chips.py has the chips and the throughputs that their pipes reach.
- One pass of an inner loop takes a program `alone` cycles, if it has an SM to itself: its matrix products, then its other
  instructions (Triton waits for each product), and LATENCY cycles for each wait. A warp by itself issues an instruction every
  `pace` cycles: with 2, the model gives the 400 TFLOP/s that the FlashAttention-3 paper measured for Triton at D = 64. With C
  programs on an SM, passes overlap until the busiest pipe is full: max(busiest pipe, alone / C). The pipeline hides the loads
  of tiles, where there is one.
- The prologue and epilogue of a program issue each instruction outside the inner loops once, and wait for memory twice. Where
  the compiler made no loop, because the code runs at most once, that code takes as long as the last loop.
- Programs run on the chip in waves. If all programs take equally long, a partly filled last wave takes as long as a full one.
  Otherwise half of what the longest program takes beyond the mean is added.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from tfkern.bench.chips import H100, Machine

LATENCY = {
    "barriers": 30, "wgmma waits": 60, "tensor-memory waits": 120, "shuffles": 12, "copy waits": 30, "LDS waits": 64,
    "loads": 600,
}  # fmt: skip
MEMORY_LATENCY = 800


@dataclass(frozen=True)
class Work:
    """The work of one launch: its number of programs, the passes of each inner loop, and the bytes that it moves."""

    programs: int
    passes: tuple[float, ...]  # of each inner loop by all programs, in the order of the code
    loaded: float  # bytes read from L2 by all programs
    memory: float  # least bytes to and from device memory
    longest: float  # passes of the longest program


@dataclass(frozen=True)
class Prediction:
    """The time of one launch, and the pipe that bounds it (or "latency", "L2", "memory")."""

    microseconds: float
    bound: str


class Loop(NamedTuple):
    """An inner loop. busy: the cycles for which one pass of a program keeps each pipe busy. alone: the cycles of one pass of a
    program that has an SM to itself."""

    busy: dict[str, float]
    alone: float


def alone(instructions: int, busy: dict[str, float], waits: dict[str, int], machine: Machine) -> float:
    """The cycles of one pass of a program that has an SM to itself. instructions: those that one warp issues. busy: the cycles
    of each pipe. waits: the number of waits, by kind."""
    vector = max([machine.pace * instructions, *(cycles for pipe, cycles in busy.items() if pipe != "tensor")])
    return busy.get("tensor", 0.0) / machine.tensor + vector + sum(LATENCY[kind] * n for kind, n in waits.items())


def predict(
    work: Work, loops: list[Loop], outside: float, occupancy: int, machine: Machine = H100, memory_waits: int = 2
) -> Prediction:
    """The prediction of a launch. outside: the cycles in which a program issues the instructions outside its inner loops.
    occupancy: the programs that fit on an SM. memory_waits: how often a program waits for memory outside its inner loops."""
    loops = loops + loops[-1:] * (len(work.passes) - len(loops))
    each = min(occupancy, max(1, math.ceil(work.programs / machine.sms)))
    by_pipe = {"latency": 0.0}
    for passes, loop in zip(work.passes, loops, strict=True):
        for pipe, cycles in loop.busy.items():
            by_pipe[pipe] = by_pipe.get(pipe, 0.0) + passes * cycles / (machine.tensor if pipe == "tensor" else 1.0)
        by_pipe["latency"] += passes * loop.alone / each
    by_pipe["issue"] = by_pipe.get("issue", 0.0) + work.programs * outside
    by_pipe["latency"] += work.programs * (machine.pace * outside + memory_waits * MEMORY_LATENCY) / each
    seconds = {pipe: cycles / machine.sms / machine.clock for pipe, cycles in by_pipe.items()}
    # In the last wave, SMs that have fewer programs than the others are idle until these end.
    slots = machine.sms * each
    mean = sum(work.passes) / work.programs
    uneven = math.ceil(work.programs / slots) * slots / work.programs if work.longest <= mean * 1.01 else 1.0
    tail = max(0.0, work.longest / mean - 1.0) * slots / work.programs / 2 if mean else 0.0
    seconds = {pipe: s * (uneven + tail) for pipe, s in seconds.items()}
    seconds["L2"] = work.loaded / machine.l2
    seconds["memory"] = work.memory / machine.memory
    bound = max(seconds, key=seconds.get)
    return Prediction(seconds[bound] * 1e6, bound)
