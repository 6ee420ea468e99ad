"""Train attention-only transformers of 0, 1 and 2 layers on repeated random tokens, and show how induction heads form.

Prints what each head does, and writes a report, pictures and a JSON file of the figures.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

import torch

from tfkern.commands.arguments import SEED, number, writable
from tfkern.commands.tables import table, width
from tfkern.extras import require
from tfkern.progress import Progress
from tfkern.training.circuits import pictures, report, runs
from tfkern.training.circuits.repeats import LearnRepeats

LAYERS = (0, 1, 2)


def add_arguments(parser) -> None:
    steps = LearnRepeats().steps
    parser.add_argument("--out", type=Path, default=Path("tfkern-out/circuits"), help="folder of the pictures")
    parser.add_argument(
        "--steps", type=number(int, 1), help=f"updates of each model (default: {steps}); fewer only show that it works"
    )
    parser.add_argument("--seed", type=SEED, default=0)


def run(args) -> int:
    """Train and report. The exit status: 0 if an induction head forms with two layers and none with one, else 1. With --steps
    it is always 0."""
    require("matplotlib", "demo")
    writable(args.out)
    torch.set_num_threads(1)  # steps this small gain little from more, and one thread sums in a fixed order
    start, progress = time.perf_counter(), Progress()
    task = dataclasses.replace(LearnRepeats(), **({"steps": args.steps} if args.steps else {}))
    done = [runs.trained(dataclasses.replace(task, layers=n), args.seed, show=progress.show) for n in LAYERS]
    progress.clear()
    computed_by = report.provenance(done[-1], args.seed)
    told = text(done, computed_by)
    print(told, flush=True)
    (args.out / "report.txt").write_text(told + "\n", "utf-8")
    (args.out / "results.json").write_text(json.dumps(report.figures(done, computed_by), indent=1) + "\n", "utf-8")
    for path in (*pictures.write(args.out, done, computed_by), args.out / "report.txt", args.out / "results.json"):
        print(f"wrote {path}")
    problems = [] if args.steps else report.shortcomings(done)
    for problem in problems:
        print(problem)
    print(f"{'failed' if problems else 'done'} in {time.perf_counter() - start:.0f} s")
    return 1 if problems else 0


def text(done: list[runs.Run], computed_by: str) -> str:
    """The report: the setting, the tables, and the largest difference from the reference."""
    task, two = done[-1].task, done[-1]
    kinds, guessing = task.vocab_size, math.log(task.vocab_size)
    any_seen, looked_up = runs.ideals(task)
    periods = f"periods {task.shortest} to {task.longest}"
    return f"""{computed_by}

{task.steps} steps of {task.rows} sequences of {task.context} tokens of {kinds} kinds, {periods}.
Losses in nats a token. In the repeat, guessing among all kinds has ln {kinds} = {guessing:.3f}, predicting any token seen
so far {any_seen:.3f}, and a perfect induction head {looked_up:.3f}. The induction score is the highest prefix-matching score
of all heads; looking everywhere alike has {report.chance(two):.3f}, {runs.FORMED} or more makes an induction head.

{table(report.MODELS, report.models(done), 1, width())}

{table(report.HEADS, report.each_head(done), 2, width())}

{table(report.CIRCUITS, report.circuits(two), 2, width())}

{table(report.SHARES, report.shares(done[1]), 1, width())}

The logits differ from those by tfkern.reference in float64 by at most {max(map(runs.apart, done)):.1e}."""
