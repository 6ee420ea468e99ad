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


def _spans(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) address of every loop."""
    return [(x.target, x.address) for x in code if x.target is not None and x.target < x.address]


def loops(code: list[Instruction], multiply: tuple[str, ...], outermost: bool = False) -> list[list[Instruction]]:
    """The bodies of the innermost (or outermost) loops with a matrix instruction (whose opcode begins with one of `multiply`),
    in the order of the program."""
    multiplies = [x.address for x in code if x.opcode.startswith(multiply)]
    spans = sorted(s for s in _spans(code) if any(s[0] <= a <= s[1] for a in multiplies))
    found = spans if outermost else [s for s in spans if not any(_within(s, t) for t in spans)]
    return [[x for x in code if lo <= x.address <= hi] for lo, hi in _merged(found)]


def _within(s: tuple[int, int], t: tuple[int, int]) -> bool:
    """Whether loop t is a part of loop s."""
    return t != s and s[0] <= t[0] and t[1] <= s[1]


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of sorted spans. Where the compiler moves a loop's head behind its body, the spans of a nest overlap."""
    found = spans[:1]
    for lo, hi in spans[1:]:
        if lo <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], hi)
        else:
            found.append((lo, hi))
    return found


def around(code: list[Instruction], body: list[Instruction]) -> list[Instruction]:
    """The body of the loop that a loop is in, without inner ones being taken out; all of the code if it is in none."""
    lo, hi = body[0].address, body[-1].address
    spans = [s for s in _spans(code) if s[0] <= lo and hi <= s[1] and s != (lo, hi)]
    first, last = min(spans, key=lambda s: s[1] - s[0], default=(code[0].address, code[-1].address))
    return [x for x in code if first <= x.address <= last]
