"""Verify the kernels, train GPT, BERT and ViT with the fused and the naive attention, and a tiny GPT through the Triton kernels
as well, and write a report with pictures."""

import functools
import itertools
import json
import time
from pathlib import Path

import torch

import tfkern
from tfkern import launch, reference, testing
from tfkern.commands import info, verify
from tfkern.commands.arguments import writable
from tfkern.commands.tables import table, width
from tfkern.extras import require
from tfkern.models.gpt import GPTConfig
from tfkern.progress import Progress, counted
from tfkern.training import pictures, provenance, report
from tfkern.training.presets import TASKS
from tfkern.training.recipe import Recipe
from tfkern.training.report import NAIVE, Comparison, Run
from tfkern.training.tasks import LearnText, Task
from tfkern.training.trainer import Training

KERNEL_CASES = ("vit-197", "causal", "window", "padded", "gqa-everything", "d80")
# The GPT that trains through the kernels. It is so small that Triton's interpreter does a step within a second. Its context
# is so long that there are several tiles of 32 queries and 64 keys, of which the last ones are not full.
TINY = LearnText(
    GPTConfig(context=72, layers=2, heads=4, width=64), Recipe(steps=60, rows=1, learning_rate=5e-3), name="tiny gpt"
)
QUICK_STEPS, QUICK_TINY_STEPS = 40, 12
SEED = 0
# The scores that a full run must reach (measured on two CPU cores: see README). --quick does not check them.
TARGETS = {"gpt": ("below", 2.3), "vit": ("at least", 0.90)}
CURVES_APART = 0.02  # nats; naive and fused attention differ only in the order of float32 sums
# The bound in nats for the tiny GPT, whose curves are shorter. Over six seeds the cpu backend's curves were at most 5e-5 from
# those of naive attention. Without the gradient of the queries they were 0.002 apart after 12 steps, and 0.07 after 60.
TINY_APART = 5e-4
FOLDER = Path("tfkern-out/demo")
CHECKPOINT = FOLDER / "demo-gpt.safetensors"  # `tfkern train` gives no checkpoint this name


def add_arguments(parser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} training steps each, to see it work within a minute"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="the report's folder")


def run(args) -> int:
    """Run the demo. The exit status: 0 if the kernels are within their error budgets, the loss curves agree, and a full run
    reaches its targets, else 1."""
    for module in ("matplotlib", "safetensors", "sklearn"):
        require(module, "demo")
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # steps this small gain little from more threads, and lose much if the cores are shared
    writable(args.out)
    print(f"tfkern {tfkern.__version__} on {info.describe(device)}\n", flush=True)
    problems = check_kernels(device)
    comparisons = compare_all(device, args.quick)
    problems += judge(comparisons, args.quick)
    computed_by = provenance.computed_by([r.backend for c in comparisons.values() for r in c.runs], device, SEED)
    print(f"\nTrained from one seed with each attention, naive being tfkern.reference; losses in nats:\n{computed_by}\n")
    print(table(report.HEADINGS, report.summary(comparisons), 2, width()), flush=True)
    for path in write(args.out, comparisons, computed_by, problems):
        print(f"wrote {path}")
    print(f"\n{(args.out / 'sample.txt').read_text(encoding='utf-8')}")
    option = "" if args.out == FOLDER else f" --checkpoint {args.out / CHECKPOINT.name}"
    print(f"`tfkern generate{option}` has more text of this GPT")
    for problem in problems:
        print(problem)
    print(f"{'failed' if problems else 'done'} in {time.perf_counter() - start:.0f} s")
    return 1 if problems else 0


def write(folder: Path, comparisons: dict[str, Comparison], computed_by: str, problems: list[str]) -> list[Path]:
    """Write the pictures, the sample, the figures and the checkpoint of the GPT to a folder. Return their paths."""
    drawn = pictures.write(folder, comparisons, SEED)
    sample, results, checkpoint = (folder / name for name in ("sample.txt", "results.json", CHECKPOINT.name))
    gpt, bert = comparisons["gpt"].shown, comparisons["bert"].shown
    sample.write_text(report.samples(gpt, bert, SEED), "utf-8")
    results.write_text(json.dumps(report.figures(comparisons, computed_by, problems), indent=1) + "\n", "utf-8")
    gpt.training.save(checkpoint)
    return [*drawn, sample, results, checkpoint]


def check_kernels(device: torch.device) -> list[str]:
    """Run the Triton kernels, and print their errors against the float64 oracle beside the budgets. Return a list of
    problems."""
    if "portable" not in verify.backends(device):
        return ["the Triton kernels don't run here; `tfkern info` says why"]
    cases = [case for case in testing.CASES if case.name in KERNEL_CASES]
    asked = counted(itertools.product(cases, verify.DTYPES[:2]), lambda one: f"kernels against the oracle, {one[0]}, {one[1]}")
    results = [verify.checked(case, "portable", dtype, device) for case, dtype in asked]
    rows = []
    for r in results:
        figures = (f"{e.error:.1e} / {e.budget:.1e}{'' if e.ok else ' !'}" for e in r.errors)
        rows.append((r.case.name, str(r.dtype).removeprefix("torch."), *figures))
    by = provenance.label("portable", device)
    print(f"Triton kernels, backend {by}, forward and backward: largest error against float64 / budget:\n")
    print(table(("case", "dtype", *verify.QUANTITIES), rows, 2, width()), flush=True)
    return [f"the kernels are wrong on {r.case.name} in {r.dtype}" for r in results if not r.ok]


def compared(task: Task, backends: tuple[str | None, ...], bound: float, device: torch.device, steps: int) -> Comparison:
    """Train a task from one seed with the naive attention and with each backend, of which None is the default choice. bound:
    how far apart in nats the loss curves may be."""
    progress, runs = Progress(), []
    for asked in (NAIVE, *backends):
        attention = reference.attention if asked == NAIVE else functools.partial(tfkern.attention, backend=asked)
        training = Training.start(task, attention, steps, SEED, device)
        backend = NAIVE if asked == NAIVE else provenance.backend(training, asked)
        what = f"{task.name} with attention by {provenance.label(backend, device)}"
        with launch.counting() as launches:
            training.run(
                on_step=lambda t, what=what: progress.show(f"{what}: {len(t.losses)} of {steps}, loss {t.losses[-1]:.3f}")
            )
        runs.append(Run(backend, training, training.score(), dict(launches)))
    progress.clear()
    return Comparison(task.name, runs, bound)


def compare_all(device: torch.device, quick: bool) -> dict[str, Comparison]:
    """The comparisons by name: every model trained by the default backend, and a tiny GPT by the Triton kernels and by the cpu
    backend, or on a GPU the eager one."""
    beside = "cpu" if device.type == "cpu" else "eager"
    backends = tuple(name for name in (beside, "portable") if name in verify.backends(device))
    found = [compared(TINY, backends, TINY_APART, device, QUICK_TINY_STEPS if quick else TINY.steps)]
    for task in TASKS.values():
        found.append(compared(task, (None,), CURVES_APART, device, QUICK_STEPS if quick else task.steps))
    return {c.name: c for c in found}


def judge(comparisons: dict[str, Comparison], quick: bool) -> list[str]:
    """The problems found: loss curves too far apart, kernels that were not launched, and unless `quick` targets that were
    missed."""
    problems = [
        f"{c.name}: the loss curves are {c.apart:.3g} nats apart, which is more than {c.bound:g}"
        for c in comparisons.values() if not c.apart <= c.bound
    ]  # fmt: skip
    for c in comparisons.values():
        for run in c.runs:
            launched = [any(name.startswith(kind) for name in run.launches) for kind in ("flash_fwd", "flash_bwd")]
            if run.backend == "portable" and not all(launched):
                problems.append(f"{c.name}: the kernels did not train it; launched were {run.launches}")
    if quick:
        return problems
    for name, (sense, target) in TARGETS.items():
        score = comparisons[name].shown.score
        if not (score.value < target if sense == "below" else score.value >= target):
            problems.append(f"{name}: {score.name} is {score}, which is not {sense} {target}")
    return problems
