"""Print predicted times of the portable kernels on an H100, with the tiles of tfkern/configs.py. Needs no GPU.

usage: python -m bench.static.model [--length 197 512 …] [--head-dim 64] [--dtype bf16] [--json FILE]

A row for each shape and direction has the launches, registers, spilled bytes, programs on an SM, the predicted time with its
band, the code by which it is calibrated (calibration.py), the pipe that bounds it, and the floor. cost_model.py has the
assumptions. against.py compares the predictions with the times that `make gpu` measured.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

from tfkern import configs, progress
from tfkern.bench.static import calibration, compile_gate, geometry, sweep
from tfkern.ending import ended


def launches(problem: geometry.Problem, direction: str, dtype: str) -> list[tuple[str, object]]:
    """(kernel, tiles) of each launch of a direction, as tfkern/backends/portable.py chooses them."""
    size, block = compile_gate.DTYPES[dtype], configs.head_dim_class(problem.head_dim)
    if direction == "forward":
        return [("flash_fwd", configs.tile_config("sm_90", "flash_fwd", size, block))]
    one = configs.one_pass("sm_90", size, block, problem.length, problem.batch * problem.heads, heavy=False)
    if one:
        return [("flash_bwd_one_pass", one)]
    dq, dkdv = ((name, configs.tile_config("sm_90", name, size, block)) for name in ("flash_bwd_dq", "flash_bwd_dkdv"))
    described = configs.described("sm_90", size, block)
    return [dq, (configs.DESCRIBED, described) if described else dkdv]


def predict(problem: geometry.Problem, direction: str, dtype: str) -> dict:
    """A row with the launches of a direction and the sum of their predicted microseconds. They are uncalibrated: for ranking,
    not for showing."""
    row = dict(**problem._asdict(), direction=direction, microseconds=0.0, kernels=[])
    for kernel, config in launches(problem, direction, dtype):
        variant = "causal" if problem.causal else "plain"
        read = measured(kernel, config, dtype, problem.head_dim, variant)
        time = read.predict(kernel, config, problem)
        row["microseconds"] += time.microseconds
        tiles = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
        row["kernels"].append(
            dict(kernel=kernel, tiles=tiles, registers=read.found.registers, spilled=read.found.spilled,
                 occupancy=read.occupancy, bound=time.bound)
        )  # fmt: skip
    return row


def estimate(problem: geometry.Problem, direction: str, dtype: str) -> calibration.Estimate:
    """The calibrated estimate of a direction, with its band, from the microseconds of `predict`."""
    return calibration.estimate("portable", direction, problem, predict(problem, direction, dtype)["microseconds"])


@functools.cache
def measured(kernel: str, config, dtype: str, head_dim: int, variant: str) -> sweep.Measured:
    """Compile a kernel for sm_90 and read its machine code, once for all shapes."""
    compiled = sweep.compiled(kernel, "sm_90", dtype, head_dim, variant, config)
    return sweep.measured(kernel, "sm_90", head_dim, config, *compiled)


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| N | | direction | launches | registers | spilled B | per SM | predicted µs | by | bound | floor µs |",
        "| --- " * 11 + "|",
    ]
    for row in rows:
        kernels = row["kernels"]
        each = {key: " + ".join(str(k[key]) for k in kernels) for key in ("registers", "spilled", "occupancy", "bound")}
        tiles = " + ".join(f"{k['kernel'].removeprefix('flash_')} {k['tiles']}" for k in kernels)
        lines.append(
            f"| {row['length']} | {'causal' if row['causal'] else 'full'} | {row['direction']} | {tiles} | {each['registers']} "
            f"| {each['spilled']} | {each['occupancy']} | {row['estimate']} | {row['estimate'].by} | {each['bound']} "
            f"| {row['floor']:.0f} |"
        )
    return "\n".join(lines)


def shown(problem: geometry.Problem, direction: str, dtype: str) -> dict:
    """A row of the table: `predict` with the calibrated estimate and the floor (µs) in the place of its microseconds."""
    row = predict(problem, direction, dtype)
    found = calibration.estimate("portable", direction, problem, row.pop("microseconds"))
    return row | dict(estimate=found, floor=calibration.floor(problem, direction))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", nargs="+", type=int, default=[128, 197, 512, 1024, 2048])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    asked = [
        (geometry.Problem(max(1, sweep.TOKENS // n), sweep.HEADS, n, args.head_dim, causal), direction)
        for n in args.length for causal in (False, True) for direction in ("forward", "backward")
    ]  # fmt: skip
    each = progress.counted(asked, lambda one: f"predicting {one[0].length} {one[1]}")
    rows = [shown(problem, direction, args.dtype) for problem, direction in each]
    print(calibration.HEADING, table(rows), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, default=vars) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
