"""Instructions of any chip's machine code, and its loops with matrix instructions. sass.py and amdgcn.py read the code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """An instruction: its address, its opcode with all modifiers, its operands as text, and the address it jumps to, or
    None."""

    address: int
    opcode: str
    operands: str
    target: int | None = None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


def _spans(code: list[Instruction]) -> list[tuple[int, int]]:
    """The (first, last) address of every loop: the target of a jump back, and the jump."""
    return [(x.target, x.address) for x in code if x.target is not None and x.target < x.address]


def loops(code: list[Instruction], multiply: tuple[str, ...], outermost: bool = False) -> list[list[Instruction]]:
    """The bodies of the innermost loops that contain a matrix instruction, in the order of the code. multiply: the prefixes of
    the opcodes of matrix instructions. outermost: the outermost such loops instead."""
    multiplies = [x.address for x in code if x.opcode.startswith(multiply)]
    spans = sorted(s for s in _spans(code) if any(s[0] <= a <= s[1] for a in multiplies))
    found = spans if outermost else [s for s in spans if not any(_within(s, t) for t in spans)]
    return [[x for x in code if lo <= x.address <= hi] for lo, hi in _merged(found)]


def _within(s: tuple[int, int], t: tuple[int, int]) -> bool:
    """Whether loop t lies within loop s and is another loop."""
    return t != s and s[0] <= t[0] and t[1] <= s[1]


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans, with overlapping ones joined. A nest's spans overlap if the compiler moves a loop's head behind its
    body."""
    found = spans[:1]
    for lo, hi in spans[1:]:
        if lo <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], hi)
        else:
            found.append((lo, hi))
    return found


def around(code: list[Instruction], body: list[Instruction]) -> list[Instruction]:
    """The body of the smallest loop around the loop `body`, inner loops included. All of the code if no loop encloses it."""
    lo, hi = body[0].address, body[-1].address
    spans = [s for s in _spans(code) if s[0] <= lo and hi <= s[1] and s != (lo, hi)]
    first, last = min(spans, key=lambda s: s[1] - s[0], default=(code[0].address, code[-1].address))
    return [x for x in code if first <= x.address <= last]
