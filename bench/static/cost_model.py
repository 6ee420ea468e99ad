"""A predicted time for a compiled kernel on a GPU that is not there, what binds it, and how far it is from the floor.

Its times rank tiles. As promises they err, by up to a factor of 2 for Hopper: what is shown comes from calibration.py.
Assumptions (each is a number to be corrected by measurements, `tfkern bench model --against results.json`):
- tfkern/bench/chips.py has the chips and what their pipes reach.
- One pass of an inner loop takes a program `alone` cycles: its matrix products, then the rest of its instructions, one after
  the other (Triton waits for each product), and LATENCY cycles for every wait in the way. A warp by itself issues an
  instruction every `pace` cycles: with 2, the model gives the 400 TFLOP/s that the FlashAttention-3 paper measured for Triton
  at D = 64. With C programs on an SM, passes overlap until the busiest pipe is full: max(busiest pipe, alone / C). Loads of
  tiles are hidden by the pipeline, where there is one.
- A program's prologue and epilogue issue every instruction outside the inner loops once, and wait twice for memory. A loop that
  the compiler made none of, as it runs once at most, takes what the last loop takes.
- Programs go over the chip in waves; the last, partly filled wave counts as much as its programs' share of an SM.
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
    """What the programs of one launch do: how many there are, and how often each kind of inner loop runs in all of them."""

    programs: int
    passes: tuple[float, ...]  # in the order of the loops in the code
    loaded: float  # bytes read from L2 by all programs
    memory: float  # bytes to and from device memory at least
    longest: float  # passes of the longest program


@dataclass(frozen=True)
class Prediction:
    """The time of one launch, and the pipe (or "latency", "L2", "memory") that takes as long."""

    microseconds: float
    bound: str


class Loop(NamedTuple):
    """An inner loop. Of one pass by a program: the cycles for which it keeps each pipe busy; the cycles that it takes if it has
    an SM to itself."""

    busy: dict[str, float]
    alone: float


def alone(instructions: int, busy: dict[str, float], waits: dict[str, int], machine: Machine) -> float:
    """Cycles of one pass by a program that has an SM to itself."""
    vector = max([machine.pace * instructions, *(cycles for pipe, cycles in busy.items() if pipe != "tensor")])
    return busy.get("tensor", 0.0) / machine.tensor + vector + sum(LATENCY[kind] * n for kind, n in waits.items())


def predict(
    work: Work, loops: list[Loop], outside: float, occupancy: int, machine: Machine = H100, memory_waits: int = 2
) -> Prediction:
    """outside: cycles that a program issues beside its inner loops; memory_waits: how often it waits for memory there."""
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
    # The last wave: SMs that have fewer programs than the others wait for them.
    slots = machine.sms * each
    mean = sum(work.passes) / work.programs
    uneven = math.ceil(work.programs / slots) * slots / work.programs if work.longest <= mean * 1.01 else 1.0
    tail = max(0.0, work.longest / mean - 1.0) * slots / work.programs / 2 if mean else 0.0
    seconds = {pipe: s * (uneven + tail) for pipe, s in seconds.items()}
    seconds["L2"] = work.loaded / machine.l2
    seconds["memory"] = work.memory / machine.memory
    bound = max(seconds, key=seconds.get)
    return Prediction(seconds[bound] * 1e6, bound)
