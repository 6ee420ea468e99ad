"""Compile candidates of tile sizes, warps and stages, read their machine code, and rank them by the cost model.

usage: python -m bench.static.sweep [--arch sm_90 …] [--kernel flash_fwd …] [--dtype bf16 …] [--head-dim 64 …]
                [--store FILE] [--seconds N] [--summary FILE]

Needs Triton only, not torch. Candidates are evaluated for each row of the table in tfkern/tiles.py that the arguments name. A
candidate's rank is the geometric mean of its predicted microseconds (cost_model.py) over LENGTHS, without a mask and with a
causal one. To save time the sweep has three steps:
1. Every candidate with two stages, without a mask.
2. The NEXT best of these with other numbers of stages, without a mask.
3. With a causal mask too: the NEXT best of all, the one that spills least among those nearly as good, and the table's own
tiles. --store FILE keeps the results, and a later sweep continues from them. --seconds N stops the sweep after N seconds.
--summary FILE writes a Markdown table of the tiles in the table and the tiles chosen. For every row of an architecture use
--dtype bf16 fp32 --head-dim 16 32 64 128 256. On a GPU, `make gpu` times the best candidates (tuning.py).
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tfkern import configs, progress
from tfkern.bench import chips
from tfkern.bench.static import amdgcn, aot, candidates, compile_gate, cost_model, geometry, machine_code, sass
from tfkern.ending import ended
from tfkern.tiles import SHARED

LENGTHS = (64, 128, 197, 512, 1024, 2048)
TOKENS = 32768  # in a batch; with 12 heads these are the shapes of BERT, GPT-2 and ViT
HEADS = 12
VARIANTS = ("plain", "causal")
NEXT = 2
NEAR = 1.03  # times the best rank: within it spills decide, then reductions across warps, the table's tiles, registers
MAX_SPILLED = 160  # bytes a thread; a candidate with more is chosen only if all have more


class Row(NamedTuple):
    """The key of a row of the table in tfkern/tiles.py. bf16 stands for all 16-bit types."""

    arch: str
    kernel: str
    dtype: str
    head_dim: int


def code_of(binary, arch: str) -> list:
    """The machine instructions of a compiled kernel."""
    if arch.startswith("gfx"):
        return amdgcn.parse(binary.asm["amdgcn"])
    return sass.parse(aot.cuobjdump(binary))


def problems(row: Row, variant: str) -> list[geometry.Problem]:
    """The problems by whose predicted times a candidate is ranked: one for each of LENGTHS."""
    size = compile_gate.DTYPES[row.dtype]
    return [geometry.Problem(max(1, TOKENS // n), HEADS, n, row.head_dim, variant == "causal", size) for n in LENGTHS]


class Measured(NamedTuple):
    """The figures of a compiled kernel that cost_model.predict needs."""

    arch: str
    found: aot.Resources
    loops: list[cost_model.Loop]
    outside: float  # issue cycles of a program outside the inner loops
    occupancy: int  # programs on an SM

    def predict(self, kernel: str, config, problem: geometry.Problem) -> cost_model.Prediction:
        work, machine = geometry.work(kernel, config, problem), chips.MACHINES[self.arch]
        return cost_model.predict(work, self.loops, self.outside, self.occupancy, machine)


def compiled(kernel: str, arch: str, dtype: str, head_dim: int, variant: str, config):
    """Compile a kernel with given tiles. Return (the binary, its resources)."""
    arguments = compile_gate.arguments(kernel, dtype, head_dim, config, variant)
    binary = aot.compile_kernel(compile_gate.function(kernel), arch, arguments, config)
    return binary, aot.resources(binary, arch)


def measured(kernel: str, arch: str, head_dim: int, config, binary, found: aot.Resources) -> Measured:
    """The figures that the cost model needs, read from a binary's machine code. found: its resources."""
    isa = amdgcn if arch.startswith("gfx") else sass
    code = code_of(binary, arch)
    all_of = kernel == "flash_bwd_dbias"  # each of its inner loops runs once within the loop over batches
    inner = machine_code.loops(code, isa.MULTIPLY, all_of) or machine_code.loops(code, isa.MULTIPLY_FP32, all_of)
    multiply_adds = geometry.multiply_adds(kernel, config, head_dim)
    machine = chips.MACHINES[arch]
    slower = {"tensor": 1024 / machine.mma, "fma": 128 / machine.fp32}  # relative to the chips for which isa.busy counts
    loops = []
    for body in inner:
        busy = {pipe: n * slower.get(pipe, 1.0) for pipe, n in isa.busy(body, config.num_warps, multiply_adds).items()}
        waits = isa.waits(body) | ({"loads": 1} if all_of else {})
        loops.append(cost_model.Loop(busy, cost_model.alone(len(body), busy, waits, machine)))
    outside = (len(code) - sum(map(len, inner))) * config.num_warps / 4
    tensor_memory = getattr(binary.metadata, "tmem_size", None) or 0
    occupancy = machine.occupancy(found.registers, found.shared, config.num_warps, tensor_memory)
    return Measured(arch, found, loops, outside, occupancy)


def evaluate(row: Row, config, variant: str) -> dict:
    """The resources of a candidate, its occupancy, and its predicted microseconds (`us`) and bound by length. If it cannot be
    used, `problem` tells why in the place of the predictions."""
    arch, kernel, dtype, head_dim = row
    try:
        binary, found = compiled(kernel, arch, dtype, head_dim, variant, config)
    except Exception as error:  # any error of the compiler is the result
        return dict(problem=repr(error).splitlines()[0][:200])
    result = dict(vars(found), across=aot.reduces_across_warps(binary))
    if found.shared > SHARED[arch]:
        return result | dict(problem=f"needs {found.shared} bytes of shared memory")
    read = measured(kernel, arch, head_dim, config, binary, found)
    if not read.occupancy:
        return result | dict(problem="no program fits")
    asked = [p for p in problems(row, variant) if kernel != "flash_bwd_one_pass" or p.length <= config.block_n]
    expected = len(geometry.work(kernel, config, asked[0]).passes)
    if not 0 < len(read.loops) <= expected:
        return result | dict(problem=f"{len(read.loops)} loops where the model knows {expected}")
    times = {p.length: read.predict(kernel, config, p) for p in asked}
    us, bound = ({n: getattr(t, key) for n, t in times.items()} for key in ("microseconds", "bound"))
    return result | dict(occupancy=read.occupancy, us=us, bound=bound)


class Sweep:
    """The results of `evaluate` by (row, tiles, variant), kept in a file of JSON lines. store: the file, or None to keep none.
    until: the time.monotonic() in seconds after which nothing more is evaluated."""

    def __init__(self, store: Path | None, until: float = math.inf):
        self.store, self.until = store, until
        lines = store.read_text().splitlines() if store and store.exists() else []
        self.known = {(Row(*key[0]), tuple(key[1]), key[2]): found for key, found in map(json.loads, lines)}
        self.place = ""  # which of all rows is being evaluated, in words

    def of(self, row: Row, tiles: tuple, variant: str) -> dict:
        key = row, tiles, variant
        if key not in self.known:
            if time.monotonic() > self.until:
                raise TimeoutError
            config = configs.TileConfig(*tiles)
            found = json.loads(json.dumps(evaluate(row, config, variant)))  # the same types as when read from the file
            self.known[key] = found
            if self.store:
                with self.store.open("a") as file:
                    file.write(json.dumps([key, found]) + "\n")
        return self.known[key]

    def look(self, row: Row, step: int, tiles: list[tuple], variant: str) -> None:
        """Evaluate all of these tiles that are not known yet, and show the progress."""
        missing = [one for one in tiles if (row, one, variant) not in self.known]
        where = f"{self.place}{' '.join(map(str, row))}, {variant}, step {step} of 3"
        for one in progress.counted(missing, lambda one: f"tiles {name(one)} of {where}"):
            self.of(row, one, variant)

    def rank(self, row: Row, tiles: tuple, variants=VARIANTS) -> float:
        """The geometric mean of a candidate's predicted microseconds over lengths and variants. Infinite if it has a
        problem."""
        found = [self.of(row, tiles, variant) for variant in variants]
        if any("problem" in x for x in found):
            return math.inf
        return math.exp(sum(math.log(us) for x in found for us in x["us"].values()) / sum(len(x["us"]) for x in found))

    def order(self, row: Row, tiles: tuple) -> tuple:
        """A candidate's sort key before the last step: whether it spills more than MAX_SPILLED, then its rank without a
        mask."""
        return self.of(row, tiles, "plain").get("spilled", 0) > MAX_SPILLED, self.rank(row, tiles, ("plain",))

    def run(self, row: Row) -> list[tuple]:
        """Run the three steps for a row. Return the candidates that reach the last step, best first."""
        order = functools.partial(self.order, row)
        all_of = candidates.of(row.kernel, row.head_dim, compile_gate.DTYPES[row.dtype])
        first = [c for c in all_of if c[3] == 2]
        self.look(row, 1, first, "plain")
        first.sort(key=order)
        kept = {c[:3] for c in first[:NEXT]}
        known = {*first, *(c for c in all_of if c[:3] in kept)}
        self.look(row, 2, known, "plain")
        known = sorted(known, key=order)
        (_, best), *_ = ranks = [order(c) for c in known]
        near = [c for c, (heavy, us) in zip(known, ranks, strict=True) if not heavy and us <= NEAR * best] or known[:1]
        lightest = min(near, key=lambda c: self.of(row, c, "plain").get("spilled", 0))
        last = {*known[:NEXT], lightest, *table(row)}
        for variant in VARIANTS:
            self.look(row, 3, last, variant)
        return sorted(last, key=functools.partial(self.rank, row))

    def chosen(self, row: Row, last: list[tuple]) -> tuple:
        """The candidate of `last` to put into the table. None if every candidate has a problem."""

        def spilled(tiles) -> int:
            return max(self.of(row, tiles, variant).get("spilled", 0) for variant in VARIANTS)

        def burden(tiles):
            found = [self.of(row, tiles, variant) for variant in VARIANTS]
            across, registers = any(x["across"] for x in found), max(x["registers"] for x in found)
            return spilled(tiles), across, tiles not in table(row), registers

        sound = [c for c in last if math.isfinite(self.rank(row, c))]
        light = [c for c in sound if spilled(c) <= MAX_SPILLED] or sound
        return min((c for c in light if self.rank(row, c) <= NEAR * self.rank(row, light[0])), key=burden, default=None)

    def line(self, row: Row, tiles: tuple) -> str:
        """The results of a candidate in one line of text."""
        found = [self.of(row, tiles, variant) for variant in VARIANTS]
        if problem := next((x["problem"] for x in found if "problem" in x), None):
            return problem
        plain, causal = found
        return (
            f"rank {self.rank(row, tiles):7.1f} us, at {LENGTHS[-1]}: {list(plain['us'].values())[-1]:.0f} us "
            f"({list(plain['bound'].values())[-1]}), causal {list(causal['us'].values())[-1]:.0f} us; "
            f"{plain['registers']}, {causal['registers']} regs, {plain['spilled']}, {causal['spilled']} B spilled, "
            f"{plain['shared']} B shared, {plain['occupancy']}, {causal['occupancy']} a SM"
            f"{', reduces across warps' if plain['across'] or causal['across'] else ''}"
        )

    def change(self, row: Row, before: tuple, now: tuple) -> str:
        """A row of the summary table, which compares the tiles `before` and `now`."""

        def each(key: str) -> str:
            return " → ".join(
                ", ".join(str(self.of(row, tiles, v).get(key, "-")) for v in VARIANTS) for tiles in dict.fromkeys((before, now))
            )

        means = [f"{self.rank(row, tiles):.0f}" for tiles in (before, now)]
        longest = [
            f"{list(x['us'].values())[-1]:.0f}" if "us" in x else x["problem"]
            for x in (self.of(row, t, "plain") for t in (before, now))
        ]
        cells = [*row, name(before), name(now), *means, *longest, each("registers"), each("spilled")]
        return f"| {' | '.join(map(str, cells))} |"


def name(tiles: tuple) -> str:
    """The tiles as tables show them, such as 128x64 w4 s2."""
    m, n, warps, stages = tiles
    return f"{m}x{n} w{warps} s{stages}"


def table(row: Row) -> list[tuple]:
    """The (block_m, block_n, warps, stages) of a row in tfkern/tiles.py: one, or any number for a backward in one pass."""
    found = compile_gate.tiles(row.kernel, row.arch, compile_gate.DTYPES[row.dtype], row.head_dim, "plain")
    return [(c.block_m, c.block_n, c.num_warps, c.num_stages) for c in found]


def main() -> int:
    """Run the sweep. The exit status: 0, or 3 if the time was up before the last row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", default=list(candidates.TILES), choices=list(candidates.TILES))
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=list(aot.TARGETS))
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(compile_gate.DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--summary", type=Path)
    args = parser.parse_args()
    sweep = Sweep(args.store, time.monotonic() + args.seconds)
    summary = [
        "| | | | D | tiles before | now | predicted µs before | now | at 2048 before | now | registers | spilled B |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [Row._make(one) for one in itertools.product(args.arch, args.kernel, args.dtype, args.head_dim)]
    for number, row in enumerate(rows, 1):
        sweep.place = f"row {number} of {len(rows)}, "
        try:
            last = sweep.run(row)
        except TimeoutError:
            print(f"time is up before {' '.join(map(str, row))}")
            return 3
        best = sweep.chosen(row, last)
        for tiles in last:
            mark = ("*" if tiles == best else " ") + ("=" if tiles in table(row) else " ")
            print(f"{mark} {' '.join(map(str, row)):30} {name(tiles):16} {sweep.line(row, tiles)}", flush=True)
        summary += [sweep.change(row, before, best) for before in table(row) if best]
    if args.summary:
        args.summary.write_text("\n".join(summary) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
