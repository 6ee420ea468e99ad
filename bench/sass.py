"""Reading NVIDIA machine code (cuobjdump --dump-sass): instructions, inner loops, how long each pipe is busy with them."""

import re
from collections import Counter
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
TENSOR = ("HGMMA", "HMMA")


@dataclass(frozen=True)
class Instruction:
    """One line: its address in bytes, opcode with its modifiers, operands as text."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


def parse(text: str) -> list[Instruction]:
    """The instructions of a kernel, without the padding behind its end."""
    found = [Instruction(int(a, 16), op, rest.strip()) for a, op, rest in INSTRUCTION.findall(text)]
    last = max((i for i, x in enumerate(found) if x.name == "EXIT"), default=len(found) - 1)
    return found[: last + 1]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the innermost loops that multiply matrices, in the order of the program."""
    spans = []
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        if instruction.name == "BRA" and target and int(target[1], 16) < instruction.address:
            spans.append((int(target[1], 16), instruction.address))
    multiplies = [x.address for x in code if x.name in TENSOR]
    spans = [s for s in spans if any(s[0] <= a <= s[1] for a in multiplies)]
    innermost = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[x for x in code if lo <= x.address <= hi] for lo, hi in sorted(innermost)]


# Cycles that one warp's instruction keeps a pipe of its quarter of an SM (sm_90; throughputs of NVIDIA's CUDA C++ programming
# guide, "arithmetic instructions", over four quarters of 32 lanes).
PIPES = {
    "mufu": (8.0, ("MUFU",)),
    "fma": (1.0, ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2")),
    "imad": (2.0, ("IMAD",)),
    "alu": (2.0, (
        "IADD3", "LOP3", "ISETP", "FSETP", "FMNMX", "FMNMX3", "IMNMX", "VIMNMX", "SEL", "FSEL", "PRMT", "SHF", "LEA", "IABS",
        "F2FP", "PLOP3", "VIADD", "IADD", "MOV", "I2FP", "FCHK",
    )),
    "convert": (8.0, ("I2F", "F2I", "F2F", "I2I", "POPC", "FLO")),
}  # fmt: skip


def bytes_moved(x: Instruction) -> int:
    """Of a warp's shared-memory instruction; 0 for others."""
    width = 16 if ".128" in x.opcode else 8 if ".64" in x.opcode else 4
    if x.name in ("LDSM", "STSM"):
        return 128 * (4 if ".4" in x.opcode else 2 if ".2" in x.opcode else 1)
    if x.name in ("LDS", "STS", "LDGSTS"):
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


def busy(body: list[Instruction], warps: int) -> dict[str, float]:
    """Cycles for which a program of `warps` warps, each going through `body` once, keeps each pipe of an SM busy."""
    cycles = Counter()
    share = warps / 4  # warps that share a quarter
    for x in body:
        cycles["issue"] += share
        if x.name == "HGMMA":  # one instruction of a warpgroup: four warps issue it together
            cycles["tensor"] += wgmma_cycles(x) * warps / 4
        elif x.name == "HMMA":
            m = 2 if ".1688" in x.opcode else 1
            cycles["tensor"] += share * 8 / m  # mma.sync: half of what wgmma reaches
        for pipe, (cost, names) in PIPES.items():
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
    if "LDG" in opcodes and not opcodes & {"LDGSTS", "UTMALDG"}:  # tiles are loaded where they are needed, not ahead
        found["loads"] = 1
    return found
