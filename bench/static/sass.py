"""Read NVIDIA machine code (cuobjdump --dump-sass): its instructions, the cycles of each pipe, waits, and use of wgmma."""

import re
from collections import Counter
from collections.abc import Iterator

from tfkern.bench.static.machine_code import Instruction

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
MULTIPLY = ("HGMMA", "HMMA", "UTCHMMA")
MULTIPLY_FP32 = ("FFMA",)  # products of IEEE float32 do not use the tensor pipe


def parse(text: str) -> list[Instruction]:
    """The instructions of a kernel, without the padding after its last EXIT."""
    found = []
    for address, opcode, operands in INSTRUCTION.findall(text):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.split(".")[0] == "BRA" else None
        found.append(Instruction(int(address, 16), opcode, operands.strip(), int(target[1], 16) if target else None))
    last = max((i for i, x in enumerate(found) if x.name == "EXIT"), default=len(found) - 1)
    return found[: last + 1]


# The cycles for which one warp's instruction keeps a pipe of its quarter of an SM busy. They follow from the throughputs in
# NVIDIA's CUDA C++ programming guide, "arithmetic instructions", for four quarters of 32 lanes, and are taken to be the same
# for sm_80, sm_90 and sm_100.
MUFU_CYCLES = 8.0
PIPES = (
    ("mufu", MUFU_CYCLES, ("MUFU",)),
    ("fma", 1.0, ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2")),
    ("fma", 2.0, ("FFMA2", "FMUL2", "FADD2")),  # sm_100: two numbers a lane
    ("imad", 2.0, ("IMAD",)),
    ("alu", 2.0, (
        "IADD3", "LOP3", "ISETP", "FSETP", "FMNMX", "FMNMX3", "IMNMX", "VIMNMX", "SEL", "FSEL", "PRMT", "SHF", "LEA", "IABS",
        "F2FP", "PLOP3", "VIADD", "IADD", "MOV", "I2FP", "FCHK",
    )),
    ("convert", 8.0, ("I2F", "F2I", "F2F", "I2I", "POPC", "FLO")),
)  # fmt: skip


def bytes_moved(x: Instruction) -> int:
    """The bytes that a warp's shared-memory instruction moves; 0 for other instructions. Spill instructions count too:
    they take the same path."""
    width = 16 if ".128" in x.opcode else 8 if ".64" in x.opcode else 4
    if x.name in ("LDSM", "STSM"):
        return 128 * (4 if ".4" in x.opcode else 2 if ".2" in x.opcode else 1)
    if x.name in ("LDS", "STS", "LDGSTS", "LDL", "STL"):
        return 32 * width
    return 0


def wgmma_cycles(x: Instruction) -> float:
    """The cycles for which a wgmma keeps the tensor pipes of an SM busy, at 2048 multiply-adds of 16-bit numbers a cycle.
    They are at least the cycles in which shared memory delivers the operands that are not in registers."""
    m, n, k = map(int, re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", x.opcode).groups())
    wide = 2 if k == 8 else 1  # TF32
    from_memory = x.operands.split(",")[1].strip().startswith("gdesc")  # the first operand is in shared memory too
    operands = (n + m * from_memory) * k * 2 * wide
    return max(m * n * k * wide / 2048, operands / 128)


def busy(body: list[Instruction], warps: int, multiply_adds: float) -> dict[str, float]:
    """The cycles for which a program keeps each pipe of an SM busy, if each of its `warps` warps runs `body` once.
    multiply_adds: those of one run of the body. Only sm_100 needs them, whose tensor instructions do not tell their shape."""
    cycles = Counter()
    share = warps / 4  # warps on one quarter of an SM
    for x in body:
        cycles["issue"] += share
        if x.name == "HGMMA":  # one instruction of a warpgroup: four warps issue it together
            cycles["tensor"] += wgmma_cycles(x) * warps / 4
        elif x.name == "HMMA":
            half = ".1688" in x.opcode and "TF32" not in x.opcode
            cycles["tensor"] += share * (4 if half else 8)  # mma.sync: half of what wgmma reaches
        elif x.name == "UTCHMMA":
            cycles["tensor"] = multiply_adds / 4096
        for pipe, cost, names in PIPES:
            if x.name in names:
                cycles[pipe] += cost * share
        if moved := bytes_moved(x):
            cycles["shared"] += moved * warps / 128
        elif x.name == "SHFL":
            cycles["shared"] += warps
    return dict(cycles)


def waits(body: list[Instruction]) -> Counter:
    """Count the instructions of a loop's body that make a warp wait, by kind of wait: the keys of LATENCY in cost_model.py."""
    names = {"BAR": "barriers", "WARPGROUP": "wgmma waits", "SHFL": "shuffles", "DEPBAR": "copy waits"}
    found = Counter(names[x.name] for x in body if x.name in names and (x.name != "WARPGROUP" or ".DEPBAR" in x.opcode))
    opcodes = {x.name for x in body}
    if arrivals := sum(x.opcode.startswith("SYNCS.PHASECHK") for x in body):
        found["copy waits" if "UTMALDG" in opcodes else "tensor-memory waits"] += arrivals
    if "LDG" in opcodes and "LDGSTS" not in opcodes:  # tiles are loaded where they are needed, not prefetched
        found["loads"] = 1
    return found


NO_RESULT = (  # the prefixes of instructions that write no register as their first operand
    "ST", "RED", "BAR", "SYNCS", "BRA", "WARP", "UTMA", "EXIT", "NOP", "FENCE", "DEPBAR", "MEMBAR", "BS", "ISETP", "FSETP",
    "PLOP3", "R2UR", "ELECT", "U",
)  # fmt: skip


def _under_wgmma(body: list[Instruction]) -> Iterator[tuple[Instruction, list[set[int]]]]:
    """Yield (instruction, groups) for each instruction of a loop's body in its second pass, except wgmma and its waits. groups:
    for each group of wgmma in flight, the registers from which it reads its first operands."""
    groups: list[set[int]] = []
    reading: set[int] = set()
    for second in (False, True):
        for x in body:
            if x.name == "HGMMA":
                reading |= registers(x.operands.split(",")[1].strip(), 4)
                if "gsb0" in x.operands:
                    groups, reading = [*groups, reading], set()
            elif x.opcode.startswith("WARPGROUP.DEPBAR"):
                left = int(x.operands.split("0x")[1], 16)
                groups = groups[max(0, len(groups) - left) :]
            elif second:
                yield x, groups


def exposed(body: list[Instruction]) -> int:
    """The number of exponentials in a loop's body that are issued while no wgmma is in flight."""
    return sum(x.opcode == "MUFU.EX2" and not groups for x, groups in _under_wgmma(body))


def clobbered(body: list[Instruction]) -> list[Instruction]:
    """The instructions of a loop's body that write a register from which a wgmma in flight still reads its first operand
    (Triton issue 9433)."""
    return [
        x
        for x, groups in _under_wgmma(body)
        if not x.name.startswith(NO_RESULT) and registers(x.operands.split(",")[0], width(x)) & set().union(*groups)
    ]


def registers(operand: str, count: int) -> set[int]:
    """The numbers of the registers of an operand that is `count` registers wide: {8, 9, …} for R8. Empty if the operand is no
    register."""
    first = re.match(r"-?\|?R(\d+)", operand)
    return set(range(int(first[1]), int(first[1]) + count)) if first else set()


def width(x: Instruction) -> int:
    """The number of registers that an instruction writes."""
    if x.name == "LDSM":
        return 4
    return 4 if ".128" in x.opcode else 2 if ".64" in x.opcode or x.opcode.startswith(("CS2R", "IMAD.WIDE")) else 1
