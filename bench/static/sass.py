"""Reading NVIDIA machine code (cuobjdump --dump-sass): instructions, inner loops, how long each pipe is busy with them."""

import re
from collections import Counter
from collections.abc import Iterator

from tfkern.bench.static.machine_code import Instruction

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
MULTIPLY = ("HGMMA", "HMMA", "UTCHMMA")
MULTIPLY_FP32 = ("FFMA",)  # IEEE products have no tensor pipe


def parse(text: str) -> list[Instruction]:
    """The instructions of a kernel, without the padding behind its end."""
    found = []
    for address, opcode, operands in INSTRUCTION.findall(text):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.split(".")[0] == "BRA" else None
        found.append(Instruction(int(address, 16), opcode, operands.strip(), int(target[1], 16) if target else None))
    last = max((i for i, x in enumerate(found) if x.name == "EXIT"), default=len(found) - 1)
    return found[: last + 1]


# Cycles that one warp's instruction keeps a pipe of its quarter of an SM (throughputs of NVIDIA's CUDA C++ programming guide,
# "arithmetic instructions", over four quarters of 32 lanes; taken to be the same for sm_80, sm_90 and sm_100).
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
    """Of a warp's shared-memory instruction, or one for spilled numbers, which take the same path; 0 for others."""
    width = 16 if ".128" in x.opcode else 8 if ".64" in x.opcode else 4
    if x.name in ("LDSM", "STSM"):
        return 128 * (4 if ".4" in x.opcode else 2 if ".2" in x.opcode else 1)
    if x.name in ("LDS", "STS", "LDGSTS", "LDL", "STL"):
        return 32 * width
    return 0


def wgmma_cycles(x: Instruction) -> float:
    """Of the tensor pipes of the whole SM, 2048 multiply-adds of 16-bit numbers a cycle; at least what shared memory takes to
    deliver the operands that are not in registers."""
    m, n, k = map(int, re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", x.opcode).groups())
    wide = 2 if k == 8 else 1  # TF32
    from_memory = x.operands.split(",")[1].strip().startswith("gdesc")  # A too, not in registers
    operands = (n + m * from_memory) * k * 2 * wide
    return max(m * n * k * wide / 2048, operands / 128)


def busy(body: list[Instruction], warps: int, multiply_adds: float) -> dict[str, float]:
    """Cycles for which a program of `warps` warps, each going through `body` once, keeps each pipe of an SM busy. multiply_adds
    of the body are for sm_100, whose tensor instructions don't tell their shape."""
    cycles = Counter()
    share = warps / 4  # warps that share a quarter
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
    """What makes a warp stand still: barriers of the program, waits for its own products, shuffles."""
    names = {"BAR": "barriers", "WARPGROUP": "wgmma waits", "SHFL": "shuffles", "DEPBAR": "copy waits"}
    found = Counter(names[x.name] for x in body if x.name in names and (x.name != "WARPGROUP" or ".DEPBAR" in x.opcode))
    opcodes = {x.name for x in body}
    if arrivals := sum(x.opcode.startswith("SYNCS.PHASECHK") for x in body):
        found["copy waits" if "UTMALDG" in opcodes else "tensor-memory waits"] += arrivals
    if "LDG" in opcodes and "LDGSTS" not in opcodes:  # tiles are loaded where they are needed, not ahead
        found["loads"] = 1
    return found


NO_RESULT = (  # names begin with
    "ST", "RED", "BAR", "SYNCS", "BRA", "WARP", "UTMA", "EXIT", "NOP", "FENCE", "DEPBAR", "MEMBAR", "BS", "ISETP", "FSETP",
    "PLOP3", "R2UR", "ELECT", "U",
)  # fmt: skip


def _under_wgmma(body: list[Instruction]) -> Iterator[tuple[Instruction, list[set[int]]]]:
    """(instruction, for each group of wgmma in flight the registers of its first operands) in a second pass through a loop's
    body, of all instructions but wgmma and its waits."""
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
    """Exponentials in a loop's body that no wgmma in flight hides."""
    return sum(x.opcode == "MUFU.EX2" and not groups for x, groups in _under_wgmma(body))


def clobbered(body: list[Instruction]) -> list[Instruction]:
    """Instructions of a loop's body that write a register from which a wgmma in flight still reads its first operand (Triton
    issue 9433)."""
    return [
        x
        for x, groups in _under_wgmma(body)
        if not x.name.startswith(NO_RESULT) and registers(x.operands.split(",")[0], width(x)) & set().union(*groups)
    ]


def registers(operand: str, count: int) -> set[int]:
    """Of an operand R8 that is `count` registers wide: {8, 9, …}; none of what is no register."""
    first = re.match(r"-?\|?R(\d+)", operand)
    return set(range(int(first[1]), int(first[1]) + count)) if first else set()


def width(x: Instruction) -> int:
    """Registers that an instruction writes."""
    if x.name == "LDSM":
        return 4
    return 4 if ".128" in x.opcode else 2 if ".64" in x.opcode or x.opcode.startswith(("CS2R", "IMAD.WIDE")) else 1
