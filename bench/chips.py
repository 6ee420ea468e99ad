"""GPUs: what one has and what its pipes reach; below which time no kernel gets.

The H100 runs at 1.70 GHz under this load. Its tensor pipes reach 87% of 2048 multiply-adds a cycle and SM (798 TFLOP/s measured
for bf16 matmul), copies reach 3.0 TB/s to device memory, reads 5.5 TB/s from L2. The numbers of the other chips are from their
data sheets, with memory at 85% of them and tensor pipes at the H100's share: estimates, for ranking tiles only.
"""

import math
from dataclasses import dataclass


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


def floor(flops: float, exps: float, memory: float, machine: Machine = H100) -> float:
    """Microseconds below which no kernel gets: matrix products, exponentials, and bytes, each by itself at full speed."""
    tensor = flops / (machine.tensor * 2 * machine.multiply_adds * machine.sms * machine.clock)
    return 1e6 * max(tensor, exps / (machine.exp2 * machine.sms * machine.clock), memory / machine.memory)
