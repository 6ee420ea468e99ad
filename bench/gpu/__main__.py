"""Run what needs a GPU, in three calls of a few minutes each: `make gpu CALL=1`, then 2, then 3.

usage: python -m tfkern.bench.gpu --call {1,2,3} [--budget SECONDS] [--out FOLDER] [--commit HASH] [--dry-run]
                                    [--only STEP …] [--fresh]

Each step runs in processes of its own (supervisor.py), with its share of the time that is left. Rows are appended to
FOLDER/<gpu>/rows.jsonl as they come. If that file is not there, it begins as a copy of the one in bench/results. A case that
an earlier call finished is not run again, unless its step runs in every call; a case that failed is. --fresh forgets the
earlier rows. The run ends by writing FOLDER/<gpu>/<date>.json and .csv and the plots, also if it is cut off. The exit status is
0 if nothing is wrong. --dry-run takes the same path without a GPU, up to the driver; without --call it makes all three calls.
"""

import argparse
import datetime
import functools
import os
import shutil
import signal
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tfkern.bench import report, runner
from tfkern.bench.gpu import chip_tests, prewarm, steps
from tfkern.bench.gpu.rows import RowFile, RowsError, current, problems
from tfkern.bench.gpu.supervisor import Step, Supervisor
from tfkern.bench.gpu.worker import ROOT, plain

COMMITTED = ROOT / "bench" / "results"
DRY_BUDGET = 900.0  # seconds for a call of a dry run
REPORTING = 12.0  # seconds that the report may take
IN_NAMES = frozenset(string.ascii_letters + string.digits + "._-")  # allowed in names of files from a GPU machine
CORES = 15  # worker processes; a GPU machine has 16 cores


def step(name: str, cases, seconds: float, **options) -> Step:
    return Step(name, functools.partial(plain, cases), seconds, **options)


def compiling(problems, seconds: float) -> Step:
    """The step that compiles the kernels of `problems` ahead. Without it the GPU waits while each kernel is compiled at its
    first launch."""
    cases = functools.partial(steps.compiled, problems=problems)
    return step("prewarm", cases, seconds, workers=CORES, quiet=60, always=True, fake=True)


ENVIRONMENT = step("environment", steps.environment, 6, always=True)
# {call: (seconds for all of its steps, its steps)}
CALLS: dict[int, tuple[float, list[Step]]] = {
    1: (170, [
        ENVIRONMENT,
        compiling(prewarm.first_call, 35),
        step("features", steps.features, 18),
        step("headline", steps.headline, 55),
        step("smoke", steps.smokes, 30, alone=True, fake=True),
    ]),
    2: (210, [
        ENVIRONMENT,
        compiling(prewarm.second_call, 30),
        Step("chip-tests", chip_tests.run, 90, workers=CORES),
        step("hopper", steps.hopper, 40),
        step("repeat", steps.repeat, 20),
        step("peer-faults", steps.peers, 10),
    ]),
    3: (270, [
        ENVIRONMENT,
        compiling(prewarm.third_call, 45),
        step("tune", steps.tune, 60, fake=True),
        step("sanitizer", steps.sanitizer, 55, quiet=60),
        step("training", steps.training, 40),
        step("memory", steps.memory, 15),
        step("flex", steps.flex, 25, quiet=60),
        step("overhead", steps.overhead, 8, fake=True),
    ]),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    names = dict.fromkeys(step.name for _, found in CALLS.values() for step in found)
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--call", type=int, choices=list(CALLS), help="which of the three")
    parser.add_argument("--budget", type=float, help="seconds for the call, in the place of its own")
    parser.add_argument("--began", type=float, default=time.time(), help="since when they count, in seconds since 1970")
    parser.add_argument("--out", type=Path, help="default: bench/results; of a dry run: tfkern-out")
    parser.add_argument("--commit", help="the hash of what runs, where there is no .git")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier calls")
    return parser.parse_args()


def main() -> int:
    """Run the calls that the command line asks for, and return the exit status.

    It is 0, or 1 if anything is wrong, 2 if no call is named or there is no GPU, 3 if rows cannot be written, and 128 + n
    after signal n.
    """
    args = arguments()
    machine = runner.machine() | ({"commit": args.commit} if args.commit else {})
    if args.call is None and not args.dry_run:
        lines = (f"  make gpu CALL={n} COMMIT=$(git rev-parse --short HEAD)  # {s:.0f} s" for n, (s, _) in CALLS.items())
        print("one call after the other, with a look at the results between them:", *lines, sep="\n", file=sys.stderr)
        return 2
    if machine["device"] == "cpu" and not args.dry_run:
        print("there is no GPU here; ARGS=--dry-run goes through a call without one", file=sys.stderr)
        return 2
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    rows = open_rows(args, machine["device"])
    if rows.torn:
        print(f"{rows.torn} lines of {rows.path} were torn, and are dropped", flush=True)
    unfinished: list[str] = []
    try:
        for call in [args.call] if args.call else list(CALLS):
            unfinished += run(call, args, rows, machine, lambda: bool(signals))
            args.began = time.time()
    except RowsError as error:
        print(f"ENDED {error}", file=sys.stderr)
        return 3
    finally:
        finish(rows, machine)
    if signals:
        return 128 + signals[0]
    return 1 if problems(rows.rows) or (args.dry_run and unfinished) else 0  # a real run may leave cases to the next


def open_rows(args: argparse.Namespace, device: str) -> RowFile:
    """The file of rows for a device. If it is not there, it begins as a copy of the committed one."""
    name = "dry-run" if args.dry_run else "".join(c if c in IN_NAMES else "-" for c in runner.folder_name(device))
    folder = (args.out or (ROOT / "tfkern-out" if args.dry_run else COMMITTED)) / name
    path, committed = folder / "rows.jsonl", COMMITTED / name / "rows.jsonl"
    if args.fresh or (args.dry_run and args.out is None):
        path.unlink(missing_ok=True)
    elif committed.exists() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(committed, path)
    return RowFile(path)


def run(call: int, args: argparse.Namespace, rows: RowFile, machine: dict, cut: Callable[[], bool]) -> list[str]:
    """Run the steps of a call, and return the names of those that have cases left to do.

    Each step gets a share of the time that is left, in proportion to its `seconds`. `cut` returns whether the run has to stop.
    """
    budget, found = CALLS[call]
    budget = args.budget or (DRY_BUDGET if args.dry_run else budget)
    found = [step for step in found if step.name in args.only]
    until = time.monotonic() + budget - (time.time() - args.began) - REPORTING
    print(f"call {call}: {until - time.monotonic():.0f} s for {', '.join(step.name for step in found)}", flush=True)
    unfinished = []
    about = {key: machine[key] for key in ("device", "commit") if key in machine}
    supervisor = Supervisor(rows, args.dry_run, cut, about | dict(date=f"{datetime.date.today()}"))
    for index, one in enumerate(found):
        left = until - time.monotonic()
        if cut() or left < 1:
            print(f"{one.name}: no time left; the same command goes on with it", flush=True)
            unfinished.append(one.name)
            continue
        share = left * one.seconds / sum(later.seconds for later in found[index:])
        outcome = supervisor.run(one, share)
        print(f"{one.name}: {outcome} of {share:.0f}", flush=True)
        if outcome.done < max(1, outcome.cases):
            unfinished.append(one.name)
    return unfinished


def finish(rows: RowFile, machine: dict) -> None:
    """Close the rows, write the results files and plots, and print the problems. If a file cannot be written, the problems are
    printed all the same."""
    rows.close()
    folder = rows.path.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder) as new:  # a half-written file replaces none
            report.write(current(rows.rows), Path(new), machine)
            for file in Path(new).iterdir():
                print(file.replace(folder / file.name))
    except (OSError, ImportError) as error:
        print(f"no report: {type(error).__name__}: {error}", file=sys.stderr)
    for problem in problems(rows.rows):
        print("PROBLEM", problem, flush=True)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # does not wait for a process that the GPU holds
