"""Compare the measured times of our kernels in a results file of `make gpu` with the predicted times and their bands.

usage: python -m bench.static.against RESULTS.json [--dtype bf16]

The predictions are for the kernels of this checkout, compiled now. It should be the checkout that the results come from.
"""

import argparse
import sys
from pathlib import Path

from tfkern import progress, tiles
from tfkern.bench import results
from tfkern.bench.static import calibration, geometry, hopper_model, model
from tfkern.ending import ended

PROVIDERS = {"tfkern portable": "portable", "tfkern hopper": "hopper"}


def predicted(kind: str, direction: str, problem: geometry.Problem, dtype: str, triton: str) -> calibration.Estimate:
    """The estimate of a direction, or the sum over several directions joined by +. kind: "portable" or "hopper". triton: the
    version of Triton that the results come from."""
    if "+" in direction:
        first, second = (predicted(kind, way, problem, dtype, triton) for way in direction.split("+"))
        return first + second
    if kind == "portable":
        return model.estimate(problem, direction, dtype)
    return hopper_model.estimate(problem, hopper_model.way(problem, direction, triton), dtype)[0]


def timed(loaded: dict) -> list[dict]:
    """The rows of a results file that have times of our kernels. Hopper rows of head dims that its backward lacks are left out.
    Where a shape, direction and provider have two times, that of a CUDA graph is taken, which does not include Python."""
    found = {}
    shapes = {s["name"]: s for s in loaded["shapes"]}
    for row in loaded["rows"]:
        provider, shape = row.get("provider"), shapes.get(row.get("shape"))
        if provider not in PROVIDERS or shape is None or not row.keys() >= {"ms", "direction"}:
            continue
        if provider == "tfkern hopper" and shape["head_dim"] not in tiles.HOPPER_BACKWARD["flash_bwd_dq"]:
            continue
        key = row["shape"], row["direction"], provider
        if key not in found or row.get("graph"):
            found[key] = row
    return list(found.values())


def compare(loaded: dict, dtype: str) -> list[tuple[dict, calibration.Estimate, float]]:
    """Return (row, estimate, measured microseconds) for each row of `timed`."""
    shapes, triton, found = {s["name"]: s for s in loaded["shapes"]}, loaded["machine"]["triton"], []
    for row in progress.counted(timed(loaded), lambda row: f"predicting {row['shape']} {row['direction']}"):
        s = shapes[row["shape"]]
        problem = geometry.Problem(s["batch"], s["heads"], s["length"], s["head_dim"], s["is_causal"])
        found.append((row, predicted(PROVIDERS[row["provider"]], row["direction"], problem, dtype, triton), row["ms"] * 1e3))
    return found


def text(found: list[tuple[dict, calibration.Estimate, float]], device: str) -> str:
    """The comparison as a table in Markdown, and how many times lie within their bands. device: the name of the GPU."""
    lines = [
        f"Measured on {device}; predicted for an H100.",
        "",
        "| shape | direction | kernels | predicted µs | by | measured µs | measured / predicted | within |",
        "| --- " * 8 + "|",
    ]
    for row, guess, measured in found:
        lines.append(
            f"| {row['shape']} | {row['direction']} | {PROVIDERS[row['provider']]} | {guess} | {guess.by} "
            f"| {measured:.0f} | {measured / guess.microseconds:.2f} | {'yes' if guess.holds(measured) else 'no'} |"
        )
    lines.append("")
    for name, calibrated in (("Calibrated", True), ("Not calibrated", False)):
        held = [guess.holds(measured) for _, guess, measured in found if (guess.by != calibration.NOT) == calibrated]
        lines.append(f"{name}: {sum(held)} of {len(held)} within their bands.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a results file of `make gpu`")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    args = parser.parse_args()
    loaded = results.load(args.results)
    found = compare(loaded, args.dtype)
    if not found:
        print(
            f"{args.results} has no time of tfkern's kernels; its attention rows may all be skipped or failed", file=sys.stderr
        )
        return 1
    print(text(found, loaded["machine"]["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main, (results.ResultsError,)))
