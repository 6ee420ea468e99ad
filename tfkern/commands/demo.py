"""Verify the kernels, train GPT, BERT and ViT with the fused and the naive attention, and write a report with pictures."""

import sys
import time
from pathlib import Path

import torch

import tfkern
from tfkern import reference, testing
from tfkern.commands import info, verify
from tfkern.extras import require
from tfkern.training import report
from tfkern.training.tasks import TASKS, Task
from tfkern.training.trainer import Training

KERNEL_CASES = ("vit-197", "causal", "window", "padded", "gqa-everything", "d80")
QUICK_STEPS = 40
# What a full run must reach (measured on two CPU cores: see README); --quick only prints.
TARGETS = {"gpt": ("below", 2.3), "vit": ("at least", 0.90)}
CURVES_APART = 0.02  # nats; naive and fused differ in the order of float32 sums only


def add_arguments(parser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} training steps each, to see it work within a minute"
    )
    parser.add_argument("--out", type=Path, default=Path("tfkern-out/demo"), help="the report's folder")


def run(args) -> int:
    """0 if the kernels are within their budgets, the loss curves agree, and a full run reached its targets."""
    for module in ("rich", "matplotlib", "safetensors", "sklearn"):
        require(module, "demo")
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 130)
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # steps this small gain little from more, and lose much where the cores are shared
    args.out.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]tfkern {tfkern.__version__}[/bold] on {info.describe(device)}\n")
    problems = check_kernels(console, device)
    pairs = {name: train_twice(console, task, device, args.quick) for name, task in TASKS.items()}
    problems += judge(pairs, args.quick)
    console.print(report.summary_table(pairs))
    for path in report.write(args.out, pairs, problems):
        console.print(f"wrote {path}")
    console.print(f"\n{(args.out / 'sample.txt').read_text()}", markup=False, highlight=False)
    for problem in problems:
        console.print(f"[red]{problem}[/red]")
    console.print(f"{'failed' if problems else 'done'} in {time.perf_counter() - start:.0f} s")
    return 1 if problems else 0


def check_kernels(console, device: torch.device) -> list[str]:
    """Run the Triton kernels against the oracle and print errors beside budgets; returns what is wrong."""
    from rich.progress import track
    from rich.table import Table

    if "portable" not in verify.backends(device):
        return ["the Triton kernels don't run here; `tfkern info` says why"]
    how = "in Triton's interpreter" if device.type == "cpu" else "on the GPU"
    table = Table(title=f"Triton kernels {how}, forward and backward: largest error against float64 / budget")
    for heading in ("case", "dtype", *verify.QUANTITIES):
        table.add_column(heading)
    cases = [case for case in testing.CASES if case.name in KERNEL_CASES]
    found = verify.results(cases, ["portable"], verify.DTYPES[:2], device)
    results = list(track(found, "kernels against the oracle", total=2 * len(cases), console=console))
    for r in results:
        figures = [f"{'' if e.ok else '[red]'}{e.error:.1e} / {e.budget:.1e}" for e in r.errors]
        table.add_row(r.case.name, str(r.dtype).removeprefix("torch."), *figures)
    console.print(table)
    return [f"the kernels are wrong on {r.case.name} in {r.dtype}" for r in results if not r.ok]


def train_twice(console, task: Task, device: torch.device, quick: bool) -> report.Pair:
    """The same training with the fused and the naive attention, from the same seed."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    steps = QUICK_STEPS if quick else task.steps
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    runs = {}
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        for label, attention in (("fused", tfkern.attention), ("naive", reference.attention)):
            bar = progress.add_task(f"{task.name} with {label} attention", total=steps, loss=float("nan"))
            training = Training.start(task, attention, steps, device=device)
            training.run(on_step=lambda t, bar=bar: progress.update(bar, advance=1, loss=t.losses[-1]))
            runs[label] = training
    return report.Pair(task.name, runs["fused"], runs["naive"], runs["fused"].score(), runs["naive"].score())


def judge(pairs: dict[str, report.Pair], quick: bool) -> list[str]:
    """What falls short of the promise."""
    problems = [f"{n}: the loss curves are {p.apart:.3g} nats apart" for n, p in pairs.items() if not p.apart <= CURVES_APART]
    if quick:
        return problems
    for name, (sense, target) in TARGETS.items():
        score = pairs[name].score
        if not (score.value < target if sense == "below" else score.value >= target):
            problems.append(f"{name}: {score.name} is {score}, which is not {sense} {target}")
    return problems
