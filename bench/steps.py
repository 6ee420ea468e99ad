"""The steps of `make gpu` (gpu.py): each goes through its cases, writes a row for each as it comes, and leaves out those that
an earlier call has written.

A row is a dict with `step`, the `case` that it is about, and figures, or the reason why there is none (`skipped`), or what is
wrong (`problem`).
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tfkern import testing
from tfkern.bench import blocks, peer_faults, repeats, runner, shapes
from tfkern.bench.providers import PROVIDERS

ROOT = Path(__file__).resolve().parent.parent
SMALL_TESTS = ["tests/test_small.py", "tests/test_attention.py", "tests/test_hopper.py"]  # its cases run on the chip


class Context:
    """Where a step runs: the device, whether it is for show, and when its time is up."""

    def __init__(self, device: torch.device, dry: bool, deadline: float):
        self.device, self.dry, self.deadline = device, dry, deadline
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def shapes(self) -> list[shapes.Shape]:
        return shapes.DRY_SHAPES if self.dry else shapes.GPU_SHAPES


# A step gives (case, function that makes the rows of that case), the most valuable case first.
Cases = Iterator[tuple[str, Callable[[], Iterator[dict]]]]


def attention(context: Context, graphs: bool = False) -> Cases:
    """Every provider on every shape, verified, then timed."""
    seconds = 0.01 if context.dry else 0.2
    for shape in context.shapes():
        for name in PROVIDERS:
            given = name, shape, context.dtype, context.device, seconds, graphs
            yield f"{shape.name} {name}", functools.partial(runner.figures, *given)


def tests(context: Context, files: list[str]) -> Cases:
    """pytest, each file by itself: what it counted, and the names of what failed."""
    if context.dry:
        yield "all", functools.partial(_pytest, context, *files)
        return
    for file in files:
        yield file, functools.partial(_pytest, context, file)


def _pytest(context: Context, *files: str) -> Iterator[dict]:
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report.name}", *files]
        start = time.monotonic()
        done = subprocess.run(
            command + ["--collect-only"] * context.dry, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=max(5.0, context.left()),
        )  # fmt: skip
        row = dict(seconds=round(time.monotonic() - start, 1))
        if context.dry:
            yield {**row, **(dict(problem=done.stdout[-2000:] + done.stderr[-2000:]) if done.returncode else {})}
            return
        suite = ET.parse(report.name).getroot().find("testsuite")
        row |= {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        row["failed"] = [
            c.get("name") for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None
        ]
        if row["failed"]:
            row["problem"] = f"{len(row['failed'])} tests failed"
            row["output"] = done.stdout[-6000:]
        yield row


def overhead(context: Context) -> Cases:
    """The Python around a call, on tensors too small to keep a GPU busy."""
    from tfkern.bench import overhead as measure

    def rows():
        for who, *figures in measure.rows(context.device):
            yield dict(who=who, **dict(zip(("no_grad_us", "grad_us", "both_us"), figures, strict=True)))

    yield "overhead", rows


def tune(context: Context) -> Cases:
    """Candidates of tile sizes, by time; on a machine without a GPU one of each kernel is compiled."""
    from tfkern.bench import prewarm, tuning

    if context.dry:
        yield from prewarm.cases(map(prewarm.candidate, tuning.cases(first_only=True)))
        return
    for one in tuning.cases():
        yield one.name, functools.partial(tuning.rows, one, context.device)


def repeat(context: Context) -> Cases:
    """The same inputs and seed give the same bits, many times over."""
    features = [*testing.CASES, *testing.FEATURE_CASES][:: 60 if context.dry else 1]
    return repeats.cases(context.shapes(), features, context.dtype, context.device, 1 if context.dry else repeats.TIMES)


def peers(context: Context) -> Cases:
    """Where peers' gradients are NaN, who gives what."""
    return peer_faults.cases(context.dtype, context.device)


def block_steps(context: Context) -> Cases:
    """A training step of whole models."""
    for model in blocks.MODELS:
        for name in blocks.ATTENTIONS:
            yield f"{model} {name}", functools.partial(blocks.step_row, model, name, context.device, context.dry)


def memory(context: Context) -> Cases:
    """Peak memory forward and backward, to a length of 128k."""
    lengths = (64,) if context.dry else (1024, 4096, 16384, 65536, 131072)
    for length in lengths:
        for name in ("tfkern portable", "sdpa flash", "sdpa efficient", "naive"):
            given = name, length, context.dtype, context.device
            yield f"{length} {name}", functools.partial(runner.peak_memory, *given)


def sanitizer(context: Context) -> Cases:
    """compute-sanitizer over a few small problems, forward and backward, with every feature."""
    import shutil

    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

    def check(tool: str) -> Iterator[dict]:
        command = [sys.executable, "-m", "tfkern.bench.sanitized"]
        if not Path(program).exists():
            if context.dry:
                subprocess.run(command, check=True, timeout=max(5.0, context.left()))
            yield dict(skipped="compute-sanitizer is not here")
            return
        done = subprocess.run(
            [program, f"--tool={tool}", "--error-exitcode=9", *command], capture_output=True, text=True, check=False,
            timeout=max(5.0, context.left()),
        )  # fmt: skip
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        yield dict(summary=summary, **({} if done.returncode == 0 else {"problem": done.stdout[-3000:] + done.stderr[-1000:]}))

    for tool in ("memcheck", "racecheck"):
        yield tool, functools.partial(check, tool)


def all_tests() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py"))


STEPS: dict[str, Callable[[Context], Cases]] = {
    "tests-small": functools.partial(tests, files=SMALL_TESTS),
    "attention": attention,
    "overhead": overhead,
    "graphs": functools.partial(attention, graphs=True),
    "tune": tune,
    "repeat": repeat,
    "peer-faults": peers,
    "blocks": block_steps,
    "memory": memory,
    "sanitizer": sanitizer,
    "tests-all": lambda context: tests(context, [f for f in all_tests() if f not in SMALL_TESTS]),
}


def main() -> int:
    """0: all cases are there; 3: time was up; 1: a case broke, and the others went on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    # what went wrong in an earlier call is tried again
    written = [row for row in runner.load_rows(args.rows) if row["step"] != args.step or not row.get("problem")]
    args.rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    done = {(row["step"], row.get("case")) for row in written}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = Context(device, args.dry_run, time.monotonic() + args.seconds)
    broken = 0
    with args.rows.open("a") as file:
        for case, rows in STEPS[args.step](context):
            if (args.step, case) in done:
                continue
            if context.left() < 2:
                return 3
            try:
                found = list(rows())
            except subprocess.TimeoutExpired:
                return 3
            except Exception as error:  # one case's failure is its row, not the end of the step
                found = [dict(problem=f"{type(error).__name__}: {str(error)[:2000]}")]
                broken += 1
            for row in found:
                file.write(json.dumps(dict(step=args.step, case=case, **row)) + "\n")
                file.flush()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
