#!/usr/bin/env python3
"""Everything that a GPU machine can prove, in one command with a time budget: `make gpu BUDGET=540`.

usage: gpu.py [--budget SECONDS] [--out FOLDER] [--dry-run] [--only STEP …] [--fresh]

Steps run in processes of their own, the most valuable first, each with at most its share of what time is left; one that crashes
or runs out of time leaves its rows behind and the next goes on. Rows are kept in FOLDER/<gpu>/rows.jsonl as they come, and a
second call does only what is not there yet (--fresh starts anew). The end is FOLDER/<gpu>/<date>.json and .csv, and the plots.
--dry-run goes through every step up to the launch on a machine without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# Name and the seconds that it may take at most, most valuable first; steps.py has what they do.
STEPS = {
    "tests-small": 120, "attention": 150, "overhead": 20, "graphs": 60, "tune": 120, "repeat": 30, "peer-faults": 20,
    "blocks": 90, "memory": 60, "sanitizer": 60, "tests-all": 600,
}  # fmt: skip


def run_step(name: str, rows: Path, seconds: float, dry: bool) -> str:
    """How a step ended. Its rows are in the file already."""
    command = [sys.executable, "-m", "tfkern.bench.steps", name, "--rows", str(rows), "--seconds", str(int(seconds))]
    environment = dict(os.environ)
    if dry and name in ("tune", "overhead"):
        environment["TRITON_INTERPRET"] = "0"  # these compile for a GPU that is not there
    elif dry:
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(command + ["--dry-run"] * dry, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=seconds + 15)  # a step ends by itself when its time is up; this is for one that hangs
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    return {0: "done", 3: "out of time"}.get(code, f"failed with {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier calls")
    args = parser.parse_args()
    start = time.monotonic()
    from tfkern.bench import report, runner

    machine = runner.machine()
    if machine["device"] == "cpu" and not args.dry_run:
        print("there is no GPU here; --dry-run goes through the steps without one", file=sys.stderr)
        return 2
    folder = args.out / ("dry-run" if args.dry_run else runner.folder_name(machine["device"]))
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    if args.fresh:
        rows.unlink(missing_ok=True)
    before = {row["name"] for row in runner.load_rows(rows) if row["step"] == "end"}
    failed = []
    for name, most in STEPS.items():
        left = args.budget - (time.monotonic() - start) - 20  # the report wants some seconds at the end
        if name not in args.only or name in before:
            continue
        if left < 10:
            print(f"{name}: no time left; run the same command again to go on", flush=True)
            continue
        began = time.monotonic()
        outcome = run_step(name, rows, min(left, most), args.dry_run)
        print(f"{name}: {outcome} after {time.monotonic() - began:.0f} s", flush=True)
        if outcome == "done":
            with rows.open("a") as file:
                file.write(json.dumps(dict(step="end", name=name)) + "\n")
        elif outcome.startswith("failed"):
            failed.append(name)
    report.write(rows, folder, machine)
    return 1 if failed or report.problems(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
