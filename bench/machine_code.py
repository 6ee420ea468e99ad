"""Machine code of any chip, as its own module reads it (sass.py, amdgcn.py): instructions, and the loops that matter."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One line: where it stands, its opcode with all modifiers, its operands as text, and where it jumps to."""

    address: int
    opcode: str
    operands: str
    target: int | None = None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


def loops(code: list[Instruction], multiply: tuple[str, ...]) -> list[list[Instruction]]:
    """The bodies of the innermost loops with a matrix instruction (whose opcode begins with one of `multiply`), in the order
    of the program."""
    spans = [(x.target, x.address) for x in code if x.target is not None and x.target < x.address]
    multiplies = [x.address for x in code if x.opcode.startswith(multiply)]
    spans = [s for s in spans if any(s[0] <= a <= s[1] for a in multiplies)]
    innermost = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[x for x in code if lo <= x.address <= hi] for lo, hi in sorted(innermost)]
