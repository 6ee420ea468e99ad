"""The steps of `make gpu` (gpu.py): each gives its cases, the most valuable first, and a case makes rows (rows.py)."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import tfkern
from tfkern import testing
from tfkern.bench import blocks, runner, shapes, smoke
from tfkern.bench.providers import UnavailableError
from tfkern.bench.worker import Cases, Context

HEADLINE = ("tfkern portable", "sdpa default", "sdpa cudnn", "sdpa flash", "sdpa efficient")
REPEATS = 100
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"  # where it is not on the PATH
TOOLS = [
    ("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks_event_reasons.active,power.draw,"
     "power.limit,temperature.gpu,memory.total,memory.used", "--format=csv"),
    ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv"),
    ("nvcc", "--version"),
    ("df", "-h", "/tmp"),
    ("free", "-g"),
]  # fmt: skip


def environment(context: Context) -> Cases:
    """What the figures hang on, as the machine's own tools say it."""

    def rows():
        yield dict(runner.machine(), cores=os.cpu_count(), variables=sorted(k for k in os.environ if k.startswith("TRITON")))
        for command in TOOLS:
            if shutil.which(command[0]):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                yield dict(command=" ".join(command), says=(done.stdout + done.stderr).splitlines())

    yield "environment", rows


def features(context: Context) -> Cases:
    """The portable kernels, a dozen features against the oracle."""
    cases = [case for case in (*testing.CASES, *testing.FEATURE_CASES) if case.name in testing.SHORT]
    for case in cases[:: 4 if context.dry else 1]:
        yield case.name, functools.partial(_checked, case, context)


def _checked(case: testing.Case, context: Context) -> Iterator[dict]:
    errors = testing.check(case, context.dtype, "portable", context.device)
    row = dict(backend="portable", errors={e.quantity: [e.error, e.budget] for e in errors})
    wrong = "; ".join(str(e) for e in errors if not e.ok)
    yield {**row, "problem": f"wrong results: {wrong}"} if wrong else row


def headline(context: Context) -> Cases:
    """The portable kernels beside PyTorch's, verified, then timed in CUDA graphs."""
    return attention(context, HEADLINE)


def attention(context: Context, names: tuple[str, ...], graphs: tuple[bool, ...] = (True,)) -> Cases:
    """Providers on every shape; without a GPU there are no graphs."""
    for graph in graphs if not context.dry else (False,):
        for shape in shapes.DRY_SHAPES if context.dry else shapes.GPU_SHAPES:
            for name in names:
                case = f"{shape.name} {name}{', graph' if graph else ''}"
                yield case, functools.partial(_figures, name, shape, context, graph)


def _figures(name: str, shape: shapes.Shape, context: Context, graphs: bool) -> Iterator[dict]:
    try:
        yield from runner.figures(name, shape, context.dtype, context.device, 0.01 if context.dry else 0.1, graphs)
    except UnavailableError as reason:
        yield dict(shape=shape.name, provider=name, skipped=str(reason), **({"problem": str(reason)} if reason.wrong else {}))


def smokes(context: Context) -> Cases:
    """Each kernel for Hopper, once."""
    for form in smoke.FORMS:
        yield form, functools.partial(smoke.rows, form, context.device, context.dry)


def hopper(context: Context) -> Cases:
    """The kernels for Hopper, verified, then timed, in graphs first."""
    return attention(context, ("tfkern hopper",), graphs=(True, False))


def repeat(context: Context) -> Cases:
    """The same inputs and seed give the same bits, many times over."""
    cases = [*testing.CASES, *testing.FEATURE_CASES]
    for case in cases[:: 60 if context.dry else 1]:
        yield case.name, functools.partial(_same_bits, case, context)


def _same_bits(case, context: Context) -> Iterator[dict]:
    inputs = testing.make_inputs(case, context.dtype, context.device)
    function = functools.partial(tfkern.attention_varlen if case.lengths else tfkern.attention, backend="portable")
    first = testing.results(function, inputs)
    count = 1 if context.dry else REPEATS
    for index in range(count):
        again = testing.results(function, inputs)
        for name, x in first.items():
            if not torch.equal(x.view(torch.uint8), again[name].view(torch.uint8)):
                yield dict(problem=f"{name} differs in repeat {index + 1}")
                return
    yield dict(repeats=count)


def tune(context: Context) -> Cases:
    """Candidates of tile sizes, by time; on a machine without a GPU one of each kernel is compiled."""
    from tfkern.bench import tuning

    for case, config in tuning.hopper_cases(first_only=context.dry):
        yield f"{case} {config}", functools.partial(tuning.time_hopper, case, config, context.device, context.dry)
    for case, config in tuning.cases(first_only=context.dry):
        yield f"{case} {config}", functools.partial(tuning.time_one, case, config, context.device, context.dry)


def sanitizer(context: Context) -> Cases:
    """compute-sanitizer over small problems, forward and backward; without it they run by themselves."""
    for backend in ("hopper", "portable"):
        for tool in ("memcheck", "racecheck"):
            yield f"{tool} {backend}", functools.partial(_watched, tool, backend, context)


def _watched(tool: str, backend: str, context: Context) -> Iterator[dict]:
    program = shutil.which("compute-sanitizer") or SANITIZER
    command = [sys.executable, "-m", "tfkern.bench.sanitized", backend]
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
    """A training step of whole models."""
    for model in blocks.MODELS:
        for name in blocks.ATTENTIONS:
            yield f"{model} {name}", functools.partial(blocks.step_row, model, name, context.device, context.dry)


def memory(context: Context) -> Cases:
    """Peak memory forward and backward, to a length of 128k."""
    for length in (64,) if context.dry else (1024, 4096, 16384, 65536, 131072):
        for name in ("tfkern portable", "sdpa flash", "sdpa efficient", "naive"):
            yield f"{length} {name}", functools.partial(_memory, name, length, context)


def _memory(name: str, length: int, context: Context) -> Iterator[dict]:
    try:
        yield from runner.peak_memory(name, length, context.dtype, context.device)
    except UnavailableError as reason:
        yield dict(provider=name, length=length, skipped=str(reason))


def flex(context: Context) -> Cases:
    """FlexAttention, which compiles for each shape."""
    return attention(context, ("flex",), graphs=(False,))


def overhead(context: Context) -> Cases:
    """The Python around a call, on tensors too small to keep a GPU busy."""
    from tfkern.bench import overhead as measure

    def rows():
        for who, *figures in measure.rows(context.device):
            yield dict(who=who, **dict(zip(("no_grad_us", "grad_us", "both_us"), figures, strict=True)))

    yield "overhead", rows
