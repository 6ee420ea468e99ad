#!/usr/bin/env python3
"""Compile every candidate of tile sizes, warps and stages for a kernel, read its machine code, and rank by the cost model.

usage: sweep.py --kernel flash_fwd [--arch sm_90] [--dtype bf16] [--head-dim 64] [--variant plain …] [--json FILE] [--top 10]

Needs Triton alone. The rank is the geometric mean, over the lengths and variants, of the predicted time divided by the floor
(cost_model.py); for other architectures than sm_90, whose pipes the model does not know, by spilled bytes, then by occupancy
times the tile's size. On a GPU, `tfkern bench tune` ranks the same candidates by time.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import aot
import compile_gate
import cost_model
import sass

LENGTHS = (197, 512, 1024, 2048)
TOKENS = 32768  # in a batch; 12 heads: the shapes of BERT, GPT-2 and ViT
HEADS = 12
CANDIDATES = {
    "flash_fwd": [(m, n) for m in (64, 128, 256) for n in (32, 64, 128)],
    "flash_bwd_dq": [(m, n) for m in (64, 128) for n in (32, 64, 128)],
    "flash_bwd_dkdv": [(m, n) for m in (32, 64, 128) for n in (64, 128)],
}
OWNS_KEYS = ("flash_bwd_dkdv",)


def code_of(compiled) -> list:
    """The instructions of a compiled kernel."""
    cuobjdump = Path(aot.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return sass.parse(
            subprocess.run([cuobjdump, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
        )


def work(kernel: str, config, length: int, head_dim: int, causal: bool) -> cost_model.Work:
    """What a launch over TOKENS tokens of sequences of one length does (kernels/band.py has the geometry)."""
    batch = max(1, TOKENS // length)
    heads = batch * HEADS
    owned, step = (config.block_n, config.block_m) if kernel in OWNS_KEYS else (config.block_m, config.block_n)
    passes = []
    for start in range(0, length, owned):
        if not causal:
            passes.append((0, length // step, int(length % step > 0)))
        elif kernel in OWNS_KEYS:  # queries from the first key of the tile on
            edge = min(math.ceil((min(owned, length - start) - 1) / step), math.ceil((length - start) / step))
            rest = max(0, length - start - edge * step)
            passes.append((edge, rest // step, int(rest % step > 0)))
        else:  # keys up to the last query of the tile
            whole = (start + 1) // step
            passes.append((0, whole, math.ceil(min(start + owned, length) / step) - whole))
    totals = [heads * sum(column) for column in zip(*passes, strict=True)]
    if not (causal and kernel in OWNS_KEYS):  # the kernel has no loop for tiles cut on the left
        totals = totals[1:]
    row = 2 * head_dim
    programs = heads * len(passes)
    tensors = 4 if kernel == "flash_fwd" else 6
    return cost_model.Work(
        programs, tuple(totals), loaded=sum(totals) * 2 * step * row + programs * 2 * owned * row,
        memory=tensors * heads * length * row, longest=max(map(sum, passes)),
    )  # fmt: skip


def floor(kernel: str, length: int, head_dim: int, causal: bool) -> float:
    """Microseconds for one launch, of its own products and exponentials."""
    scores = max(1, TOKENS // length) * HEADS * length**2 * (0.5 if causal else 1.0)
    products = {"flash_fwd": 2, "flash_bwd_dq": 3, "flash_bwd_dkdv": 4}[kernel]
    memory = (4 if kernel == "flash_fwd" else 6) * TOKENS // length * HEADS * length * 2 * head_dim
    return cost_model.floor(2.0 * products * scores * head_dim, scores, memory)


def evaluate(kernel: str, arch: str, dtype: str, head_dim: int, variants, config) -> dict:
    """Compile a candidate for each variant; its resources, and predicted times where the model knows the chip."""
    function = getattr(compile_gate.load(f"tfkern.kernels.{compile_gate.KERNEL_FILES.get(kernel, kernel)}"), kernel)
    row = dict(kernel=kernel, arch=arch, dtype=dtype, head_dim=head_dim, config=vars(config), times={})
    ratios = []
    for variant in variants:
        try:
            compiled = aot.compile_kernel(
                function, arch, compile_gate.arguments(function, dtype, head_dim, config, variant), config
            )
            found = aot.resources(compiled, arch)
        except Exception as error:  # whatever the compiler throws is the finding
            return {**row, "problem": repr(error).splitlines()[0][:200], "rank": math.inf}
        row[variant] = vars(found)
        if found.shared > compile_gate.SHARED[arch]:
            return {**row, "problem": f"needs {found.shared} bytes of shared memory", "rank": math.inf}
        if arch == "sm_90":
            code = code_of(compiled)
            occupancy = cost_model.H100.occupancy(found.registers, found.shared, config.num_warps)
            inner = sass.loops(code)
            loops = [(len(body), sass.busy(body, config.num_warps), sass.waits(body)) for body in inner]
            outside = (len(code) - sum(map(len, inner))) * config.num_warps / 4
            for length in LENGTHS:
                job = work(kernel, config, length, head_dim, variant == "causal")
                predicted = cost_model.predict(job, loops, outside, occupancy)
                row["times"][f"{variant} {length}"] = (predicted.microseconds, predicted.bound)
                ratios.append(predicted.microseconds / floor(kernel, length, head_dim, variant == "causal"))
            row[variant] |= dict(occupancy=occupancy)
    spilled = sum(row[v]["spilled"] for v in variants)
    # A spilled byte is stored and loaded in every pass; a few outside of the loop do no harm.
    row["rank"] = math.exp(sum(map(math.log, ratios)) / len(ratios)) * (1 + spilled / 1000) if ratios else spilled
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
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
        for m, n in CANDIDATES[kernel]:
            for warps in (4, 8):
                for stages in (1, 2, 3):
                    rows.append(
                        evaluate(kernel, args.arch, args.dtype, args.head_dim, args.variant, config(m, n, warps, stages))
                    )
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
