"""Time tfkern beside PyTorch's attention, FlexAttention and the naive formula. Each is verified before it is timed.

On a GPU it prints medians by CUDA events at the sizes of ViT, BERT and GPT. Without a GPU the Triton kernels can't be timed.
Then `speed` compares the CPU backend, `compile` compiles every kernel for GPUs and prints the resources it needs, `model`
predicts times on an H100, each with a band, and `overhead` measures the time of a call in Python.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tfkern import launch
from tfkern.commands.arguments import number, writable
from tfkern.ending import InputError
from tfkern.extras import require

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WHAT = {
    "speed": "forward and backward beside everybody else's",
    "cpu": "the CPU backend beside PyTorch's attention and the naive formula, and whole models patched and unpatched",
    "compile": "registers, spills and shared memory of every kernel; as sweep and model, in a checkout alone",
    "sweep": "candidates of tile sizes, ranked by the cost model; its times are for ranking alone",
    "model": "predicted times on an H100, each with its band; --against RESULTS.json: how many measured ones lie within",
    "overhead": "microseconds of Python a call",
    "report": "the table and plots of a results file of `make gpu` (--results) again; --readme FILE: into that file",
}


def add_arguments(parser) -> None:
    parser.add_argument(
        "what", nargs="?", choices=list(WHAT), default="speed", help="; ".join(f"{k}: {v}" for k, v in WHAT.items())
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="speed; default: bf16 on a GPU, fp32 without; cpu: default fp32 and bf16"
    )
    parser.add_argument("--seconds", type=number(float, 0.001), default=0.3, help="speed and cpu: for each figure")
    parser.add_argument(
        "--out", type=Path, default=Path("tfkern-out/bench"), help="speed and cpu: folder of results.json and .png"
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="cpu: of them, default all")
    parser.add_argument("--lengths", nargs="+", type=number(int, 1), metavar="N", help="cpu: default 8 to 8192")
    parser.add_argument("--threads", nargs="+", type=number(int, 1), metavar="T", help="cpu: default 1 and all")
    parser.add_argument("--against", type=Path, help="model: a results file of `make gpu`")
    parser.add_argument("--results", type=Path, help="report: a results file of `make gpu`")
    parser.add_argument("--readme", type=Path, help="report: a Markdown file with marks, between which the table goes")


def run(args) -> int:
    """Run a benchmark. The exit status: 0, or not 0 if something timed here was wrong or a kernel exceeds its bounds."""
    if args.what == "compile":
        return static("compile_gate")
    if args.what == "sweep":
        note = "Times here are the cost model's own, for ranking tiles alone. `tfkern bench model` has predictions, with bands."
        print(note, flush=True)
        return static("sweep")
    if args.what == "model":
        return static("against", str(args.against)) if args.against else static("model")
    if args.what == "overhead":
        return process(["-m", "tfkern.bench.overhead"])
    require("matplotlib", "demo")
    if args.what == "cpu":
        return cpu(args)
    return report(args) if args.what == "report" else speed(args)


def speed(args) -> int:
    from tfkern.bench import plots, runner

    writable(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU: the Triton kernels can't be timed here. This compares the CPU backend; `tfkern bench model` predicts.\n")
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    rows = []
    for row in runner.run(dtype, device, args.seconds):
        rows.append(row)
        where = f"{row['shape']:15} {row.get('direction', ''):17} {row['provider']:16}"
        reason = row.get("problem") or row.get("skipped")
        print(where, reason or f"{row['ms']:9.3f} ms  {row['tflops']:8.3f} TFLOP/s", flush=True)
    runner.save(args.out / "results.json", rows)
    plots.draw(args.out / "results.json", args.out / "results.png")
    print(f"wrote {args.out / 'results.json'} and {args.out / 'results.png'}")
    return 1 if any("problem" in row for row in rows) else 0


def cpu(args) -> int:
    from tfkern.bench import cpu as bench
    from tfkern.bench import cpu_cases, cpu_memory, cpu_models, runner

    cases = args.cases or list(cpu_cases.CASES)
    if unknown := [name for name in cases if name not in cpu_cases.CASES]:
        raise InputError(f"--cases has {unknown}; the cases are {list(cpu_cases.CASES)}")
    dtypes = [args.dtype] if args.dtype else list(bench.DTYPES)
    if dtypes[0] not in bench.DTYPES:
        raise InputError(f"--dtype must be one of {list(bench.DTYPES)} for cpu, but is {dtypes[0]}")
    writable(args.out)
    threads = args.threads or sorted({1, torch.get_num_threads()})
    rows, path = [], args.out / "cpu.json"
    for row in bench.run(cases, args.lengths or bench.LENGTHS, dtypes, threads, args.seconds):
        rows.append(row)
        where = (
            f"{row['case']:18} N={row['length']:<5} {row['dtype']} {row['threads']} {row['direction']:16} {row['provider']:7}"
        )
        print(
            where,
            row.get("problem") or row.get("skipped") or f"{row['ms']:10.3f} ms ({row['p20']:.3f} to {row['p80']:.3f})",
            flush=True,
        )
        runner.save(path, rows)
    models, memory = ([] if args.cases else list(more) for more in (cpu_models.run(args.seconds), cpu_memory.run()))
    runner.save(path, rows + models + memory)
    bench.draw(path, args.out / "cpu.png")
    print(f"\n{bench.table(rows)}\n")
    for found, table in ((models, cpu_models.table), (memory, cpu_memory.table)):
        if found:
            print(f"{table(found)}\n")
    print(f"wrote {path} and {args.out / 'cpu.png'}")
    return 1 if any("problem" in row for row in rows + models + memory) else 0


def report(args) -> int:
    from tfkern.bench import report as again

    if args.results is None:
        raise InputError("report needs --results FILE, a results file of `make gpu`")
    text = again.table(args.results)
    if args.readme:
        again.parts(args.readme)
    writable(args.results.parent, "the folder of --results")
    print(text)
    for picture in again.draw(args.results):
        print(f"wrote {picture}")
    if args.readme:
        again.insert(text, args.readme)
    return 0


def static(name: str, *arguments: str) -> int:
    """Run a program of bench/static in a process of its own, since kernels may be bound to Triton's interpreter in this one.
    Return its exit status."""
    if importlib.util.find_spec("tfkern.bench.static") is None:
        raise InputError("this needs a checkout of tfkern (`pip install -e .` in it): the wheel lacks bench/static")
    return process(["-m", f"tfkern.bench.static.{name}", *arguments])


def process(arguments: list[str]) -> int:
    """Run Python in another process. Return its exit status as a shell shows it. An interrupt reaches only this process,
    which then ends the other."""
    if why := launch.missing():
        raise InputError(f"this compiles kernels, but {why}")
    # The session of its own keeps the terminal's interrupts from it and its compilers, which would report them as a failure.
    child = subprocess.Popen([sys.executable, *arguments], env={**os.environ, "TRITON_INTERPRET": "0"}, start_new_session=True)
    try:
        code = child.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and all processes that it has started
        child.wait()
    return 128 - code if code < 0 else code
