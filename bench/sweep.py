#!/usr/bin/env python3
"""Compile every candidate of tile sizes, warps and stages for a kernel, read its machine code, and rank by the cost model.

usage: sweep.py --kernel flash_fwd [--arch sm_90] [--dtype bf16] [--head-dim 64] [--variant plain …] [--json FILE] [--top 10]

Needs Triton alone. The rank is the geometric mean, over the lengths and variants, of the predicted time divided by the floor
(cost_model.py). On a GPU, `make gpu` times the same candidates (tuning.py).
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import amdgcn
import aot
import candidates
import compile_gate
import cost_model
import geometry
import machine_code
import sass

LENGTHS = (64, 128, 197, 512, 1024, 2048)
TOKENS = 32768  # in a batch; 12 heads: the shapes of BERT, GPT-2 and ViT
HEADS = 12


def code_of(binary, arch: str) -> list:
    """The instructions of a compiled kernel."""
    if arch.startswith("gfx"):
        return amdgcn.parse(binary.asm["amdgcn"])
    return sass.parse(aot.cuobjdump(binary, "--dump-sass"))


def problems(head_dim: int, variant: str) -> list[geometry.Problem]:
    """What a candidate is judged by."""
    return [geometry.Problem(max(1, TOKENS // n), HEADS, n, head_dim, variant == "causal") for n in LENGTHS]


class Measured(NamedTuple):
    """What the compiler made of a kernel, as cost_model.predict wants it."""

    arch: str
    found: aot.Resources
    loops: list[cost_model.Loop]
    outside: float  # cycles issued beside the inner loops
    occupancy: int

    def predict(self, kernel: str, config, problem: geometry.Problem) -> cost_model.Prediction:
        work, machine = geometry.work(kernel, config, problem), cost_model.MACHINES[self.arch]
        return cost_model.predict(work, self.loops, self.outside, self.occupancy, machine)


def compiled(kernel: str, arch: str, dtype: str, head_dim: int, variant: str, config):
    """(the binary, its resources) of a kernel with given tiles."""
    arguments = compile_gate.arguments(kernel, dtype, head_dim, config, variant)
    binary = aot.compile_kernel(compile_gate.function(kernel), arch, arguments, config)
    return binary, aot.resources(binary, arch)


def measured(kernel: str, arch: str, head_dim: int, config, binary, found: aot.Resources) -> Measured:
    """Read the machine code of a binary."""
    isa = amdgcn if arch.startswith("gfx") else sass
    code = code_of(binary, arch)
    inner = machine_code.loops(code, isa.MULTIPLY)
    multiply_adds = geometry.multiply_adds(kernel, config, head_dim)
    busy = [isa.busy(body, config.num_warps, multiply_adds) for body in inner]
    machine = cost_model.MACHINES[arch]
    loops = [
        cost_model.Loop(cycles, cost_model.alone(len(body), cycles, isa.waits(body), machine))
        for body, cycles in zip(inner, busy, strict=True)
    ]
    outside = (len(code) - sum(map(len, inner))) * config.num_warps / 4
    tensor_memory = getattr(binary.metadata, "tmem_size", None) or 0
    occupancy = machine.occupancy(found.registers, found.shared, config.num_warps, tensor_memory)
    return Measured(arch, found, loops, outside, occupancy)


def evaluate(kernel: str, arch: str, dtype: str, head_dim: int, variants, config) -> dict:
    """Compile a candidate for each variant; its resources and predicted times."""
    row = dict(kernel=kernel, arch=arch, dtype=dtype, head_dim=head_dim, config=vars(config), times={})
    ratios = []
    for variant in variants:
        try:
            binary, found = compiled(kernel, arch, dtype, head_dim, variant, config)
        except Exception as error:  # whatever the compiler throws is the finding
            return {**row, "problem": repr(error).splitlines()[0][:200], "rank": math.inf}
        row[variant] = vars(found)
        if found.shared > compile_gate.SHARED[arch]:
            return {**row, "problem": f"needs {found.shared} bytes of shared memory", "rank": math.inf}
        read = measured(kernel, arch, head_dim, config, binary, found)
        if not read.occupancy:
            return {**row, "problem": f"no program fits: {found}", "rank": math.inf}
        expected = len(geometry.work(kernel, config, problems(head_dim, variant)[0]).passes)
        if len(read.loops) > expected:
            return {**row, "problem": f"{len(read.loops)} loops where the model knows {expected}", "rank": math.inf}
        for problem in problems(head_dim, variant):
            if kernel == "flash_bwd_one_pass" and problem.length > config.block_n:
                continue
            predicted = read.predict(kernel, config, problem)
            row["times"][f"{variant} {problem.length}"] = (predicted.microseconds, predicted.bound)
            ratios.append(predicted.microseconds / geometry.floor(kernel, problem, cost_model.MACHINES[arch]))
        row[variant] |= dict(occupancy=read.occupancy)
    spilled = sum(row[v]["spilled"] for v in variants)
    # A spilled byte is stored and loaded in every pass; a few outside of the loop do no harm.
    row["rank"] = math.exp(sum(map(math.log, ratios)) / len(ratios)) * (1 + spilled / 1000)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", default=list(candidates.TILES), choices=list(candidates.TILES))
    parser.add_argument("--arch", default="sm_90", choices=list(aot.TARGETS))
    parser.add_argument("--dtype", default="bf16", choices=list(compile_gate.DTYPES))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--variant", nargs="+", default=["plain", "causal"])
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = compile_gate.load("tfkern.configs").TileConfig
    rows = []
    for kernel in args.kernel:
        for tiles in candidates.of(kernel):
            rows.append(evaluate(kernel, args.arch, args.dtype, args.head_dim, args.variant, config(*tiles)))
    rows.sort(key=lambda row: (row["kernel"], row["rank"]))
    for kernel in args.kernel:
        for row in [r for r in rows if r["kernel"] == kernel][: args.top]:
            c = row["config"]
            found = " ".join(
                f"{v}: {row[v]['registers']} regs {row[v]['spilled']} B {row[v].get('occupancy', '-')}/SM"
                for v in args.variant if v in row
            )  # fmt: skip
            times = " ".join(f"{key} {us:.0f} ({bound})" for key, (us, bound) in row["times"].items())
            tiles = f"{c['block_m']}x{c['block_n']} w{c['num_warps']} s{c['num_stages']}"
            print(f"{kernel:15} {tiles:16} rank {row['rank']:5.2f}  {found}  {times}{row.get('problem', '')}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, default=float) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
