"""The steps of `make gpu` (__main__.py). A step is a function that returns its cases, the most valuable first; a case yields
rows (rows.py)."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tfkern import testing
from tfkern.bench import runner, shapes
from tfkern.bench.gpu import blocks, peer_faults, prewarm, repeats, smoke, tuning
from tfkern.bench.gpu.worker import Cases, Context

HEADLINE = ("tfkern portable", "sdpa default", "sdpa cudnn", "sdpa flash", "sdpa efficient")
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"  # used if it is not on the PATH
TOOLS = [
    ("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks_event_reasons.active,power.draw,"
     "power.limit,temperature.gpu,memory.total,memory.used", "--format=csv"),
    ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv"),
    ("nvcc", "--version"),
    ("df", "-h", "/tmp"),
    ("free", "-g"),
]  # fmt: skip


def environment(context: Context) -> Cases:
    """The case that records the machine: its hardware, software versions, TRITON variables and the output of TOOLS."""

    def rows():
        about = {key: value for key, value in runner.machine().items() if key != "commit"}  # every row has the commit
        yield about | dict(cores=os.cpu_count(), variables=sorted(key for key in os.environ if key.startswith("TRITON")))
        for command in TOOLS:
            if shutil.which(command[0]):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                yield dict(command=" ".join(command), says=(done.stdout + done.stderr).splitlines())

    yield "environment", rows


def compiled(context: Context, problems: Callable[[], Iterator[prewarm.Problem]]) -> Cases:
    """The cases that compile the kernels of `problems` ahead. A dry run takes one in twenty."""
    cases = list(prewarm.cases(problems()))
    return cases[:: 20 if context.dry else 1]


def features(context: Context) -> Cases:
    """The cases that compare the portable kernels with the oracle, one for each of a dozen features."""
    for case in _features(context):
        yield case.name, functools.partial(_checked, case, context)


def _features(context: Context) -> list[testing.Case]:
    return prewarm.FEATURES[:: 4 if context.dry else 1]


def _checked(case: testing.Case, context: Context) -> Iterator[dict]:
    errors = testing.check(case, context.dtype, "portable", context.device)
    row = dict(backend="portable", errors={e.quantity: [e.error, e.budget] for e in errors})
    wrong = "; ".join(str(e) for e in errors if not e.ok)
    yield {**row, "problem": f"wrong results: {wrong}"} if wrong else row


def headline(context: Context) -> Cases:
    """The cases that verify the portable kernels and PyTorch's, and time them in CUDA graphs."""
    return attention(context, HEADLINE)


def attention(context: Context, names: tuple[str, ...], graphs: tuple[bool, ...] = (True,)) -> Cases:
    """The cases that verify and time the named providers on every shape, with or without CUDA graphs as `graphs` says. A dry
    run uses no graphs."""
    seconds = 0.01 if context.dry else 0.1
    for graph in graphs if not context.dry else (False,):
        for shape in _shapes(context):
            for name in names:
                case = f"{shape.name} {name}{', graph' if graph else ''}"
                given = name, shape, context.dtype, context.device, seconds, graph
                yield case, functools.partial(runner.figures, *given)


def _shapes(context: Context) -> list[shapes.Shape]:
    return shapes.DRY_SHAPES if context.dry else shapes.GPU_SHAPES


def smokes(context: Context) -> Cases:
    """The cases that run each form of the kernels for Hopper once (smoke.py)."""
    for form in smoke.FORMS:
        yield form, functools.partial(smoke.rows, form, context.device, context.dry)


def hopper(context: Context) -> Cases:
    """The cases that verify and time the kernels for Hopper, first in CUDA graphs, then without."""
    return attention(context, ("tfkern hopper",), graphs=(True, False))


def repeat(context: Context) -> Cases:
    """The cases that check that the same inputs and seed give the same bits in many repeats (repeats.py)."""
    features = _features(context)[: 1 if context.dry else None]
    return repeats.cases(_shapes(context), features, context.dtype, context.device, 1 if context.dry else repeats.TIMES)


def peers(context: Context) -> Cases:
    """The cases that run each provider on problems for which some return NaN gradients (peer_faults.py)."""
    return peer_faults.cases(context.dtype, context.device)


def tune(context: Context) -> Cases:
    """The cases that time candidates of tile sizes (tuning.py). A dry run compiles one candidate of each kernel instead."""
    if context.dry:
        yield from prewarm.cases(map(prewarm.candidate, tuning.cases(first_only=True)))
        return
    for one in tuning.cases():
        yield one.name, functools.partial(tuning.rows, one, context.device)


def sanitizer(context: Context) -> Cases:
    """The cases that run small problems, forward and backward, under compute-sanitizer. Where it is missing, or without a
    GPU, the problems run without it."""
    for backend in ("hopper", "portable"):
        for tool in ("memcheck", "racecheck")[: 1 if context.dry else None]:
            yield f"{tool} {backend}", functools.partial(_watched, tool, backend, context)


def _watched(tool: str, backend: str, context: Context) -> Iterator[dict]:
    program = shutil.which("compute-sanitizer") or SANITIZER
    command = [sys.executable, "-m", "tfkern.bench.gpu.sanitized", backend]
    there = Path(program).exists() and context.device.type == "cuda"
    if there:
        command = [program, f"--tool={tool}", "--error-exitcode=9", *command]
    interpreted = str(int(context.dry and backend == "portable"))
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": interpreted}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    row = dict(summary=[line for line in done.stdout.splitlines() if "SUMMARY" in line])
    if done.returncode:
        yield {**row, "problem": f"exit {done.returncode}: {done.stderr[-500:]}{done.stdout[-1400:]}"}
    else:
        yield row if there else {**row, "skipped": "compute-sanitizer is not here"}


def training(context: Context) -> Cases:
    """The cases that time a training step of whole models (blocks.py)."""
    pairs = [(model, name) for model in blocks.MODELS for name in blocks.ATTENTIONS]
    for model, name in pairs[:: 4 if context.dry else 1]:
        yield f"{model} {name}", functools.partial(blocks.step_row, model, name, context.device, context.dry)


def memory(context: Context) -> Cases:
    """The cases that measure the peak memory of forward and backward, up to a length of 128k."""
    for length in (64,) if context.dry else (1024, 4096, 16384, 65536, 131072):
        for name in ("tfkern portable", "sdpa flash", "sdpa efficient", "naive"):
            given = name, length, context.dtype, context.device
            yield f"{length} {name}", functools.partial(runner.peak_memory, *given)


def flex(context: Context) -> Cases:
    """The cases that verify and time FlexAttention, which compiles for each shape."""
    return attention(context, ("flex",))


def overhead(context: Context) -> Cases:
    """The case that times the Python around a call, on tensors too small to keep a GPU busy."""
    from tfkern.bench import overhead as measure

    def rows():
        for who, *figures in measure.rows(context.device, rounds=1 if context.dry else 150):
            yield dict(who=who, **dict(zip(("no_grad_us", "grad_us", "both_us"), figures, strict=True)))

    yield "overhead", rows
