"""Verify the kernels, train GPT, BERT and ViT with the fused and the naive attention, and write a report with pictures."""

import itertools
import time
from pathlib import Path

import torch

import tfkern
from tfkern import reference, testing
from tfkern.commands import info, verify
from tfkern.commands.arguments import writable
from tfkern.commands.tables import table, width
from tfkern.extras import require
from tfkern.progress import Progress, counted
from tfkern.training import report
from tfkern.training.presets import TASKS
from tfkern.training.tasks import Task
from tfkern.training.trainer import Training

KERNEL_CASES = ("vit-197", "causal", "window", "padded", "gqa-everything", "d80")
QUICK_STEPS = 40
# What a full run must reach (measured on two CPU cores: see README); --quick only prints.
TARGETS = {"gpt": ("below", 2.3), "vit": ("at least", 0.90)}
CURVES_APART = 0.02  # nats; naive and fused differ in the order of float32 sums only
FOLDER = Path("tfkern-out/demo")
CHECKPOINT = FOLDER / "demo-gpt.safetensors"  # a name that `tfkern train` gives to none of its own


def add_arguments(parser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} training steps each, to see it work within a minute"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="the report's folder")


def run(args) -> int:
    """0 if the kernels are within their budgets, the loss curves agree, and a full run reached its targets."""
    for module in ("matplotlib", "safetensors", "sklearn"):
        require(module, "demo")
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # steps this small gain little from more, and lose much where the cores are shared
    writable(args.out)
    print(f"tfkern {tfkern.__version__} on {info.describe(device)}\n", flush=True)
    problems = check_kernels(device)
    pairs = {name: train_twice(task, device, args.quick) for name, task in TASKS.items()}
    problems += judge(pairs, args.quick)
    print("\nTrained with the fused and with the naive attention, from the same seed:\n")
    print(table(report.HEADINGS, report.summary(pairs), 1, width()), flush=True)
    checkpoint = args.out / CHECKPOINT.name
    pairs["gpt"].fused.save(checkpoint)
    for path in (*report.write(args.out, pairs, problems), checkpoint):
        print(f"wrote {path}")
    print(f"\n{(args.out / 'sample.txt').read_text(encoding='utf-8')}")
    print(f"`tfkern generate{'' if args.out == FOLDER else f' --checkpoint {checkpoint}'}` has more text of this GPT")
    for problem in problems:
        print(problem)
    print(f"{'failed' if problems else 'done'} in {time.perf_counter() - start:.0f} s")
    return 1 if problems else 0


def check_kernels(device: torch.device) -> list[str]:
    """Run the Triton kernels against the oracle and print errors beside budgets; returns what is wrong."""
    if "portable" not in verify.backends(device):
        return ["the Triton kernels don't run here; `tfkern info` says why"]
    how = "in Triton's interpreter" if device.type == "cpu" else "on the GPU"
    cases = [case for case in testing.CASES if case.name in KERNEL_CASES]
    asked = counted(itertools.product(cases, verify.DTYPES[:2]), lambda one: f"kernels against the oracle, {one[0]}, {one[1]}")
    results = [verify.checked(case, "portable", dtype, device) for case, dtype in asked]
    rows = []
    for r in results:
        figures = (f"{e.error:.1e} / {e.budget:.1e}{'' if e.ok else ' !'}" for e in r.errors)
        rows.append((r.case.name, str(r.dtype).removeprefix("torch."), *figures))
    print(f"Triton kernels {how}, forward and backward: largest error against float64 / budget:\n")
    print(table(("case", "dtype", *verify.QUANTITIES), rows, 2, width()), flush=True)
    return [f"the kernels are wrong on {r.case.name} in {r.dtype}" for r in results if not r.ok]


def train_twice(task: Task, device: torch.device, quick: bool) -> report.Pair:
    """The same training with the fused and the naive attention, from the same seed."""
    steps, progress, runs = QUICK_STEPS if quick else task.steps, Progress(), {}
    for label, attention in (("fused", tfkern.attention), ("naive", reference.attention)):
        what = f"{task.name} with {label} attention"
        training = Training.start(task, attention, steps, device=device)
        training.run(on_step=lambda t, what=what: progress.show(f"{what}: {len(t.losses)} of {steps}, loss {t.losses[-1]:.3f}"))
        runs[label] = training
    progress.clear()
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
