"""A predicted time for a compiled kernel on a GPU that is not there, what binds it, and how far it is from the floor.

Its times rank tiles. As promises they err, by up to a factor of 2 for Hopper: what is shown comes from calibration.py.
Assumptions (each is a number to be corrected by measurements, `tfkern bench model --against results.json`):
- MACHINES has the chips. Of the H100: it runs at 1.70 GHz under this load; tensor pipes reach 87% of 2048 multiply-adds a cycle
  and SM (798 TFLOP/s measured for bf16 matmul), copies 3.0 TB/s to device memory, reads 5.5 TB/s from L2. The others' numbers
  are from their data sheets, memory at 85% of them, tensor pipes at the H100's share: estimates, for ranking tiles only.
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

LATENCY = {
    "barriers": 30, "wgmma waits": 60, "tensor-memory waits": 120, "shuffles": 12, "copy waits": 30, "LDS waits": 64,
    "loads": 600,
}  # fmt: skip
MEMORY_LATENCY = 800


@dataclass(frozen=True)
class Machine:
    """A GPU: SMs (on AMD compute units), Hz, what one holds, and the throughputs that its pipes reach."""

    sms: int = 132
    clock: float = 1.70e9
    registers: int = 65536
    lanes: int = 32  # of a warp
    shared: int = 228 * 1024  # 1 KiB of it is the system's for each program
    tensor_memory: int = 512  # columns, where there is such a memory
    warps: int = 64
    programs: int = 32
    multiply_adds: int = 2048  # of 16-bit numbers, a cycle and SM
    mma: int = 1024  # of them by mma.sync, summed in fp32
    fp32: int = 128  # multiply-adds outside of tensor pipes
    tensor: float = 0.87
    memory: float = 3.0e12
    l2: float = 5.5e12
    exp2: float = 16.0  # a cycle and SM
    pace: float = 2.0

    def occupancy(self, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
        """Programs that fit on an SM."""
        by_registers = self.registers // (math.ceil(registers / 8) * 8 * self.lanes * warps)
        by_shared = self.shared // (shared + 1024)
        by_tensor_memory = self.tensor_memory // tensor_memory if tensor_memory else self.programs
        return min(by_registers, by_shared, by_tensor_memory, self.warps // warps, self.programs)


H100 = Machine()
MACHINES = {
    "sm_80": Machine(  # A100 SXM 80 GB
        sms=108, clock=1.41e9, shared=164 * 1024, multiply_adds=1024, fp32=64, memory=1.7e12, l2=4.0e12
    ),
    "sm_86": Machine(  # GeForce RTX 3090; a program may have 99 KiB
        sms=82, clock=1.70e9, shared=100 * 1024, warps=48, programs=16, multiply_adds=256, mma=256, memory=0.80e12, l2=2.0e12
    ),
    "sm_89": Machine(  # GeForce RTX 4090; the same
        sms=128, clock=2.52e9, shared=100 * 1024, warps=48, programs=24, multiply_adds=256, mma=256, memory=0.86e12, l2=4.0e12
    ),
    "sm_120": Machine(  # GeForce RTX 5090; the same
        sms=170, clock=2.41e9, shared=100 * 1024, warps=48, programs=24, multiply_adds=256, mma=256, memory=1.5e12, l2=6.0e12
    ),
    "sm_90": H100,
    "sm_100": Machine(sms=148, clock=1.85e9, multiply_adds=4096, memory=6.8e12, l2=9.0e12),  # B200
    "gfx942": Machine(  # MI300X; a wave issues a vector instruction every 4 cycles at best
        sms=304, clock=2.1e9, registers=131072, lanes=64, shared=64 * 1024, warps=32, multiply_adds=1024, memory=4.5e12,
        l2=10.0e12, pace=5.0,
    ),
}  # fmt: skip


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


def floor(flops: float, exps: float, memory: float, machine: Machine = H100) -> float:
    """Microseconds below which no kernel gets: matrix products, exponentials, and bytes, each by itself at full speed."""
    tensor = flops / (machine.tensor * 2 * machine.multiply_adds * machine.sms * machine.clock)
    return 1e6 * max(tensor, exps / (machine.exp2 * machine.sms * machine.clock), memory / machine.memory)
