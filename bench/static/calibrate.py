"""Write calibration.json anew: the cost model's times of our kernels, with their present tiles, for the published problems.

usage: python -m bench.static.calibrate [--show]

Run it when tiles, kernels or the model change. It compiles some forty kernels, which takes about two minutes on one core, and
needs Triton but not torch. It then prints the factors and bands of each group, and how many published figures the bands hold.
--show prints these without compiling.
"""

import argparse
import dataclasses
import datetime
import json
import math
import sys
from pathlib import Path

from tfkern.bench.static import aot, calibration, geometry, hopper_model, model
from tfkern.ending import ended

DTYPE = "fp16"  # that of the published figures


def launches(group: calibration.Group, problem: geometry.Problem) -> list[tuple[str, object]]:
    """(kernel, tiles) of each launch of a problem; empty where the group has no kernel for it."""
    if group.kind == "hopper":
        return hopper_model.launches(problem, group.direction)
    return model.launches(problem, group.direction, DTYPE)


def raw(group: calibration.Group, problem: geometry.Problem) -> float:
    """The uncalibrated microseconds that the cost model predicts for a problem."""
    if group.kind == "hopper":
        return sum(x.microseconds for x in hopper_model.predict(problem, group.direction, DTYPE))
    return model.predict(problem, group.direction, DTYPE)["microseconds"]


def label(kernel: str, config) -> str:
    """The name of a kernel and its tiles in words."""
    numbers = [f"{f.name} {getattr(config, f.name)}" for f in dataclasses.fields(config) if f.compare]
    return f"{kernel}: {', '.join(numbers)}"


def tiles(group: calibration.Group) -> dict[str, str]:
    """The kernels and tiles of a group in words, by length. Lengths for which the group has no kernel are left out."""
    found = {n: launches(group, group.problem(n)) for n in calibration.LENGTHS}
    return {str(n): "; ".join(label(*each) for each in chosen) for n, chosen in found.items() if chosen}


def fit() -> dict:
    """Compile the kernels of all groups and return the contents of calibration.json."""
    rows = []
    for group in calibration.GROUPS:
        if chosen := tiles(group):
            times = {n: round(raw(group, group.problem(int(n))), 2) for n in chosen}
            rows.append(dict(**group._asdict(), tiles=chosen, microseconds=times))
            print(*group, "compiled", file=sys.stderr, flush=True)
    return dict(date=str(datetime.date.today()), triton=aot.triton.__version__, rows=rows)


def show() -> str:
    """The factors and bands as a table in Markdown, and how many published figures lie within the bands."""
    lines = [
        f"The cost model's time of {calibration.table()['date']}, Triton {calibration.table()['triton']}, by length: what it is"
        " multiplied by, and the band.",
        "",
        f"| kernels | direction | D | | by | points | {' | '.join(map(str, calibration.LENGTHS))} |",
        "| --- " * (6 + len(calibration.LENGTHS)) + "|",
    ]
    for group, points in calibration.fitted().items():
        mask, cells = "causal" if group.causal else "full", []
        for n in calibration.LENGTHS:
            if n not in calibration.raw()[group]:
                cells.append("-")
                continue
            factor, width, by = calibration.scale(group.kind, group.direction, group.problem(n))
            mark = "*" if by == calibration.NOT else ""
            cells.append(f"{factor:.2f} ({calibration.band(math.exp(-width), math.exp(width))}){mark}")
        head = f"| {group.kind} | {group.direction} | {group.head_dim} | {mask} | {group.peers.reference} | {len(points)} "
        lines.append(f"{head}| {' | '.join(cells)} |")
    inside = [held for _, _, held in calibration.left_out()]
    later = [held for _, _, held in calibration.later()]
    return "\n".join([
        *lines, "", f"*: {calibration.NOT}.",
        f"Each published length left out: the band that the others give holds {sum(inside)} of {len(inside)}.",
        f"Later figures, which no factor comes from: the bands hold {sum(later)} of {len(later)}.",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print what calibration.json gives, without compiling")
    if not parser.parse_args().show:
        calibration.TABLE.write_text(json.dumps(fit(), indent=1) + "\n")
    print(show())
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
