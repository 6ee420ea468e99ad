"""Calibrate the cost model's times by published times of kernels of the same class, and give each prediction a band.

PUBLISHED has figures of other authors' kernels on one H100. calibration.json has the model's times of our kernels for the same
problems (`python -m bench.static.calibrate` writes it). The published time divided by the model's time is a factor. There is
one for each length and group: a kind of kernel, a direction, a head dim, with or without a causal mask. A prediction is the
model's time multiplied by the factor, which is interpolated between lengths. For Hopper the factor is at least 1: those kernels
have not been timed, so the calibration must not make them faster than the model does.

The width of the band combines two errors, which are assumed to be independent. The first is the error of the factor at a
published length if it is interpolated from the other lengths. The second is the ratio between the rates of two published
implementations of the class, since ours differs from both. Each is the largest among the lengths within a factor of 2. Where
nothing is published (other head dims, a causal backward, other lengths), the factor is that of the nearest group, the band is
the widest of the kind, and the estimate is marked "not calibrated".
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tfkern.bench.static import geometry

NOT = "not calibrated"
TABLE = Path(__file__).with_name("calibration.json")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEADING = """\
Predicted, not measured: the cost model's time, corrected by a factor from published H100 times of another kernel of the same
class ("by"; bench/static/calibration.py). The percentages are the band in which the time is expected. "not calibrated": nothing
is published for such a problem, and the band is the widest of its kind."""


def _at(lengths: tuple[int, ...], *figures: int) -> dict[int, float]:
    return dict(zip(lengths, figures, strict=True))


ENDS = (LENGTHS[0], LENGTHS[-1])
# TFLOP/s of (implementation, direction, head dim, causal) by length, from the FlashAttention-3 paper: one H100 SXM, fp16, 16k
# tokens in a batch, heads x head dim = 2048; a causal mask halves the operations. For the backward only the first and the last
# length are known.
PUBLISHED = {
    ("FA2", "forward", 64, False): _at(LENGTHS, 282, 306, 318, 321, 322, 324),
    ("FA2", "forward", 64, True): _at(LENGTHS, 180, 229, 262, 284, 295, 299),
    ("FA2", "forward", 128, False): _at(LENGTHS, 309, 350, 362, 368, 370, 370),
    ("FA2", "forward", 128, True): _at(LENGTHS, 191, 260, 298, 319, 333, 335),
    ("Triton", "forward", 64, False): _at(LENGTHS, 340, 382, 396, 400, 401, 403),
    ("Triton", "forward", 64, True): _at(LENGTHS, 152, 291, 342, 363, 376, 363),
    ("Triton", "forward", 128, False): _at(LENGTHS, 323, 372, 389, 389, 392, 395),
    ("Triton", "forward", 128, True): _at(LENGTHS, 146, 273, 323, 353, 369, 378),
    ("cuDNN", "forward", 64, False): _at(LENGTHS, 335, 373, 395, 408, 412, 413),
    ("cuDNN", "forward", 64, True): _at(LENGTHS, 225, 288, 334, 363, 379, 388),
    ("cuDNN", "forward", 128, False): _at(LENGTHS, 497, 574, 617, 609, 600, 595),
    ("cuDNN", "forward", 128, True): _at(LENGTHS, 315, 410, 484, 518, 529, 539),
    ("FA3", "forward", 64, False): _at(LENGTHS, 333, 392, 460, 476, 496, 497),
    ("FA3", "forward", 64, True): _at(LENGTHS, 197, 265, 371, 420, 460, 473),
    ("FA3", "forward", 128, False): _at(LENGTHS, 467, 565, 625, 638, 646, 648),
    ("FA3", "forward", 128, True): _at(LENGTHS, 292, 423, 521, 579, 602, 616),
    ("FA2", "backward", 64, False): _at(ENDS, 198, 291),
    ("FA2", "backward", 128, False): _at(ENDS, 214, 322),
    ("cuDNN", "backward", 64, False): _at(ENDS, 266, 433),
    ("cuDNN", "backward", 128, False): _at(ENDS, 305, 516),
    ("FA3", "backward", 64, False): _at(ENDS, 272, 474),
    ("FA3", "backward", 128, False): _at(ENDS, 316, 561),
}
# TFLOP/s, published later, of FA3 and of TLX, a kernel of its class, on an H100 in bf16. Their batches and heads are not known,
# so the factors do not use them. They test the bands.
LATER = {
    ("FA3", "forward", 128, True): _at(LENGTHS[1:5], 364, 560, 667, 685),
    ("TLX", "forward", 128, True): _at(LENGTHS[1:5], 367, 568, 637, 661),
    ("FA3", "backward", 128, False): _at(LENGTHS[:5], 180, 313, 436, 527, 564),
    ("TLX", "backward", 128, False): _at(LENGTHS[:5], 213, 329, 448, 518, 567),
}


class Peers(NamedTuple):
    """The published implementations with which our kernels of one class are compared."""

    reference: str  # the one by which ours are calibrated
    apart: tuple[str, str, str]  # two implementations, and the direction in which they are compared


_HOPPER_BACKWARD = Peers("FA3", ("cuDNN", "FA3", "backward"))
CLASSES = {
    ("portable", "forward"): Peers("Triton", ("FA2", "Triton", "forward")),
    # No backward in Triton is published. FA2's takes its place, and the forwards tell how far the two may lie apart.
    ("portable", "backward"): Peers("FA2", ("FA2", "Triton", "forward")),
    ("hopper", "forward"): Peers("FA3", ("cuDNN", "FA3", "forward")),
    ("hopper", "backward"): _HOPPER_BACKWARD,
    ("hopper", "backward in one launch"): _HOPPER_BACKWARD,
}


class Group(NamedTuple):
    """A set of problems that share their factors. kind and direction: as in CLASSES."""

    kind: str
    direction: str
    head_dim: int
    causal: bool

    @property
    def peers(self) -> Peers:
        return CLASSES[self.kind, self.direction]

    @property
    def rates(self) -> dict[int, float]:
        return PUBLISHED[self.peers.reference, self.direction.split()[0], self.head_dim, self.causal]

    def published(self, length: int) -> float:
        """The published microseconds of the reference at a length."""
        return microseconds(self.problem(length), self.direction, self.rates[length])

    def problem(self, length: int) -> geometry.Problem:
        """The published problem of a length."""
        return geometry.Problem(16384 // length, 2048 // self.head_dim, length, self.head_dim, self.causal)


GROUPS = [
    Group(*which, head_dim, causal)
    for which, peers in CLASSES.items()
    for code, direction, head_dim, causal in PUBLISHED
    if (code, direction) == (peers.reference, which[1].split()[0])
]


@dataclass(frozen=True)
class Estimate:
    """A prediction in microseconds, its band from `low` to `high`, and in `by` the implementation by which it is calibrated, or
    NOT."""

    microseconds: float
    low: float
    high: float
    by: str

    def __str__(self) -> str:
        return f"{self.microseconds:.0f} ({band(self.low / self.microseconds, self.high / self.microseconds)})"

    def holds(self, measured: float) -> bool:
        return self.low <= measured <= self.high

    def __add__(self, other: "Estimate") -> "Estimate":
        """The sum of two estimates, for two launches in turn. Both errors may have the same sign, so the limits add up."""
        by = NOT if NOT in (self.by, other.by) else " + ".join(dict.fromkeys([self.by, other.by]))
        return Estimate(self.microseconds + other.microseconds, self.low + other.low, self.high + other.high, by)


def band(low: float, high: float) -> str:
    """A band in percent, as text. low and high: the ratios of its limits to the prediction."""
    return f"{100 * (low - 1):+.0f} … {100 * (high - 1):+.0f}%"


def _floor_kernel(direction: str) -> str:
    """The kernel whose work is the least that a direction needs."""
    return "flash_fwd" if direction == "forward" else "flash_bwd_one_pass"


def floor(problem: geometry.Problem, direction: str) -> float:
    """The least microseconds that any kernel can take for a problem."""
    return geometry.floor(_floor_kernel(direction), problem)


def microseconds(problem: geometry.Problem, direction: str, tflops: float) -> float:
    """The microseconds of a problem at a rate in TFLOP/s. Operations are counted as is usual in papers: two products forward,
    five backward."""
    return 2.0 * geometry.PRODUCTS[_floor_kernel(direction)] * problem.scores * problem.head_dim / tflops / 1e6


@functools.cache
def table() -> dict:
    """The contents of calibration.json."""
    return json.loads(TABLE.read_text())


@functools.cache
def raw() -> dict[Group, dict[int, float]]:
    """The model's microseconds for the published problems, by group and length."""
    rows = table()["rows"]
    return {
        Group(*(row[name] for name in Group._fields)): {int(n): us for n, us in row["microseconds"].items()} for row in rows
    }


@functools.cache
def fitted() -> dict[Group, dict[int, float]]:
    """The logarithm of the factor, by group and published length."""
    return {
        group: {n: math.log(group.published(n) / times[n]) for n in group.rates if n in times} for group, times in raw().items()
    }


def interpolated(points: dict[int, float], length: int) -> float:
    """Interpolate points linearly between lengths on a logarithmic scale. Beyond the first and the last length the value is
    constant."""
    below, above = [n for n in points if n <= length], [n for n in points if n >= length]
    if not below or not above:
        return points[min(points) if not below else max(points)]
    left, right = max(below), min(above)
    share = math.log(length / left) / math.log(right / left) if left < right else 0.0
    return points[left] + share * (points[right] - points[left])


def half_width(peers: Peers, points: dict[int, float], length: int) -> float:
    """Half the width of the band at a length, as the logarithm of a ratio. points: the logarithms of the factors, by length."""
    near = [n for n in points if length / 2 <= n <= 2 * length]
    near = near if len(near) > 1 else list(points)
    missed = [points[n] - interpolated({m: x for m, x in points.items() if m != n}, n) for n in near]
    one, other, direction = peers.apart
    apart = [
        math.log(rate / PUBLISHED[other, direction, head_dim, causal][n])
        for (code, way, head_dim, causal), rates in PUBLISHED.items()
        if (code, way) == (one, direction)
        for n, rate in rates.items()
        if n in near
    ]
    return math.hypot(max(map(abs, missed)), max(map(abs, apart)))


@functools.cache
def widest(kind: str) -> float:
    """The largest half width among the bands of a kind at the published lengths."""
    groups = {group: points for group, points in fitted().items() if group.kind == kind and len(points) > 1}
    return max(half_width(group.peers, points, n) for group, points in groups.items() for n in points)


class Scale(NamedTuple):
    """The factor of the model's time, half the width of the band as the logarithm of a ratio, and Estimate.by."""

    factor: float
    width: float
    by: str


def scale(kind: str, direction: str, problem: geometry.Problem) -> Scale:
    """The scale of a problem, from the group with the nearest head dim. The model's error is assumed not to depend on batches
    and heads, so these may differ from the published ones."""
    padded = 1 << (problem.head_dim - 1).bit_length()
    group = min(
        (g for g in fitted() if (g.kind, g.direction) == (kind, direction)),
        key=lambda g: (abs(math.log2(g.head_dim / padded)), g.causal != problem.causal),
    )
    points = fitted()[group]
    factor = math.exp(interpolated(points, problem.length))
    known = (
        len(points) > 1
        and min(points) <= problem.length <= max(points)
        and (group.head_dim, group.causal) == (problem.head_dim, problem.causal)
    )
    width = half_width(group.peers, points, problem.length) if known else widest(kind)
    return Scale(max(1.0, factor) if kind == "hopper" else factor, width, group.peers.reference if known else NOT)


def estimate(kind: str, direction: str, problem: geometry.Problem, modelled: float) -> Estimate:
    """The calibrated estimate of a problem. kind and direction: as in CLASSES. modelled: the model's microseconds."""
    factor, width, by = scale(kind, direction, problem)
    least = floor(problem, direction)
    central = max(least, modelled * factor)
    low, high = max(least, central * math.exp(-width)), central * math.exp(width)
    return Estimate(central, low, high, by)


def left_out() -> list[tuple[Group, int, bool]]:
    """Return (group, length, whether its published figure lies in the band that the other lengths give) for each
    published length of the groups that have more than two lengths."""
    found = []
    for group, points in fitted().items():
        for n in points if len(points) > 2 else ():
            rest = {m: x for m, x in points.items() if m != n}
            inside = abs(points[n] - interpolated(rest, n)) <= half_width(group.peers, rest, n)
            found.append((group, n, inside))
    return found


def later() -> list[tuple[str, int, bool]]:
    """Return (implementation, length, whether the figure lies in the band) for each figure of LATER. The band is that of the
    published problem of the length."""
    found = []
    for (code, direction, head_dim, causal), rates in LATER.items():
        group = Group("hopper", direction, head_dim, causal)
        for n, rate in rates.items():
            predicted = estimate(group.kind, direction, group.problem(n), raw()[group][n])
            found.append((code, n, predicted.holds(microseconds(group.problem(n), direction, rate))))
    return found
