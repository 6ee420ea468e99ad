"""A predicted time for a compiled kernel on a GPU that is not there, what binds it, and how far it is from the floor.

Assumptions (H100 SXM; each is a number to be corrected by measurements, `tfkern bench model --against results.json`):
- The chip runs at 1.70 GHz under this load; tensor pipes reach 87% of 4096 operations a cycle and SM (798 TFLOP/s measured for
  bf16 matmul), copies 3.0 TB/s to device memory, reads 5.5 TB/s from L2.
- One pass of an inner loop takes a program `alone` cycles: its matrix products, then the rest of its instructions, one after
  the other (Triton waits for each product), and LATENCY cycles for every wait in the way. A warp by itself issues an
  instruction every PACE cycles: with 2, the model gives the 400 TFLOP/s that the FlashAttention-3 paper measured for Triton at
  D = 64. With C programs on an SM, passes overlap until the busiest pipe is full: max(busiest pipe, alone / C). Loads of tiles
  are hidden by the pipeline, where there is one.
- A program's prologue and epilogue issue every instruction outside the inner loops once, and wait twice for memory.
- Programs go over the chip in waves; the last, partly filled wave counts as much as its programs' share of an SM.
"""

import math
from dataclasses import dataclass

LATENCY = {"barriers": 30, "wgmma waits": 60, "shuffles": 12, "copy waits": 30, "loads": 600}
MEMORY_LATENCY = 800
PACE = 2.0


@dataclass(frozen=True)
class Machine:
    """A GPU: SMs, Hz, what an SM holds, and the throughputs that its pipes reach."""

    sms: int = 132
    clock: float = 1.70e9
    registers: int = 65536
    shared: int = 227 * 1024
    warps: int = 64
    programs: int = 32
    tensor: float = 0.87
    memory: float = 3.0e12
    l2: float = 5.5e12
    exp2: float = 16.0  # a cycle and SM

    def occupancy(self, registers: int, shared: int, warps: int) -> int:
        """Programs that fit on an SM."""
        by_registers = self.registers // (math.ceil(registers / 8) * 8 * 32 * warps)
        by_shared = self.shared // (shared + 1024)
        return min(by_registers, by_shared, self.warps // warps, self.programs)


H100 = Machine()


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


def alone(instructions: int, busy: dict[str, float], waits: dict[str, int], machine: Machine) -> float:
    """Cycles of one pass by a program that has an SM to itself."""
    vector = max([PACE * instructions, *(cycles for pipe, cycles in busy.items() if pipe != "tensor")])
    return busy.get("tensor", 0.0) / machine.tensor + vector + sum(LATENCY[kind] * n for kind, n in waits.items())


def predict(
    work: Work, loops: list[tuple[int, dict, dict]], outside: float, occupancy: int, machine: Machine = H100
) -> Prediction:
    """loops: (instructions, busy cycles by pipe, waits) of each inner loop; outside: cycles a program issues beside them."""
    each = min(occupancy, max(1, math.ceil(work.programs / machine.sms)))
    by_pipe = {"latency": 0.0}
    for passes, (instructions, busy, waits) in zip(work.passes, loops, strict=True):
        for pipe, cycles in busy.items():
            by_pipe[pipe] = by_pipe.get(pipe, 0.0) + passes * cycles / (machine.tensor if pipe == "tensor" else 1.0)
        by_pipe["latency"] += passes * alone(instructions, busy, waits, machine) / each
    by_pipe["issue"] = by_pipe.get("issue", 0.0) + work.programs * outside
    by_pipe["latency"] += work.programs * (PACE * outside + 2 * MEMORY_LATENCY) / each
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


def floor(flops: float, exps: float, memory: float, machine: Machine = H100) -> float:
    """Microseconds below which no kernel gets: matrix products, exponentials, and bytes, each by itself at full speed."""
    tensor = flops / (machine.tensor * 4096 * machine.sms * machine.clock)
    return 1e6 * max(tensor, exps / (machine.exp2 * machine.sms * machine.clock), memory / machine.memory)
