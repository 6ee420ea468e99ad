"""Read AMD assembly (gfx942): its instructions, the cycles of each pipe of a compute unit, and waits."""

import re
from collections import Counter

from tfkern.bench.static.machine_code import Instruction

LINE = re.compile(r"^(?:(\.LBB\w+):|\t([a-z]+_\w+)[ \t]*([^;\n]*))", re.M)
MULTIPLY = MULTIPLY_FP32 = ("v_mfma",)
TRANSCENDENTAL = ("v_exp", "v_log", "v_rcp", "v_sqrt", "v_rsq", "v_sin", "v_cos")
SIMDS, LANES = 4, 64  # SIMDs of a compute unit, lanes of a wave


def parse(text: str) -> list[Instruction]:
    """The instructions of a kernel. An address is the number of instructions before it."""
    labels, found = {}, []
    for label, opcode, operands in LINE.findall(text):
        if label:
            labels[label] = len(found)
        else:
            found.append(Instruction(len(found), opcode, operands.strip()))
    jumps = ("s_branch", "s_cbranch")
    return [
        Instruction(x.address, x.opcode, x.operands, labels.get(x.operands)) if x.opcode.startswith(jumps) else x for x in found
    ]


def mfma_cycles(x: Instruction) -> float:
    """The cycles for which an MFMA instruction keeps the matrix unit of a SIMD busy. The multiply-adds a cycle depend on the
    type of the operands (AMD's CDNA3 instruction-set manual)."""
    m, n, k, kind = re.search(r"_(\d+)x(\d+)x(\d+)_?(\w+)", x.opcode).groups()
    return int(m) * int(n) * int(k) / (32 if kind == "f32" else 128 if kind == "xf32" else 256)


def bytes_moved(x: Instruction) -> int:
    """The bytes that a wave's LDS instruction moves; 0 for other instructions."""
    found = re.match(r"ds_(?:read|write)(2)?(?:st64)?_b(\d+)", x.opcode)
    return LANES * int(found[2]) // 8 * (2 if found[1] else 1) if found else 0


def busy(body: list[Instruction], warps: int, multiply_adds: float) -> dict[str, float]:
    """The cycles for which a program keeps each pipe of a compute unit busy, if each of its `warps` waves runs `body` once.
    multiply_adds is not used: `busy` of sass.py has the same parameters."""
    cycles = Counter()
    share = warps / SIMDS
    for x in body:
        if x.opcode.startswith(MULTIPLY):
            cycles["tensor"] += mfma_cycles(x) * share
        elif x.opcode.startswith(TRANSCENDENTAL):
            cycles["mufu"] += 16 * share
        elif x.opcode.startswith("v_"):
            cycles["alu"] += 4 * share  # a wave has 64 lanes, a SIMD 16
        elif x.opcode.startswith("s_"):
            cycles["scalar"] += 4 * share
        cycles["shared"] += bytes_moved(x) * warps / 128
    cycles["alu"] += cycles["mufu"]  # they run on the same lanes
    return {pipe: spent for pipe, spent in cycles.items() if spent}


def waits(body: list[Instruction]) -> Counter:
    """Count the waits of a wave in a loop's body, by kind as in LATENCY of cost_model.py: barriers, waits for LDS, and waits
    for loads with no matrix instruction between the load and the wait."""
    found, loading, hidden = Counter(), False, False
    for x in body:
        if x.opcode == "s_barrier":
            found["barriers"] += 1
        elif x.opcode.startswith(("global_load", "buffer_load")):
            loading, hidden = True, False
        elif x.opcode.startswith(MULTIPLY):
            hidden = True
        elif x.opcode == "s_waitcnt":
            found["LDS waits"] += "lgkmcnt" in x.operands
            if "vmcnt" in x.operands and loading:
                found["loads"] += not hidden
                loading = False
    return +found  # no zeros
