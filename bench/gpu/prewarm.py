"""Compiles what a run will need before it needs it: by as many processes as there are cores, with no GPU at work.

A problem runs the whole way that the real one takes, up to the driver, in whose place fake_gpu.py stands with an H100's
numbers. So a kernel gets the same options and argument types, and Triton keeps it on disk under the same key: its own sources,
the kernel's, the types and alignment of the arguments, constants, options, the target (sm_90), the version of ptxas, and some
environment variables. The real run, in the same environment, finds it there.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import tfkern
from tfkern import compat_triton, launch, testing
from tfkern.bench import fake_gpu, faults, launches, shapes
from tfkern.bench.gpu import peer_faults, repeats, sanitized, smoke, tuning
from tfkern.bench.providers import passed_over
from tfkern.bench.shapes import Shape

FEATURES = [case for case in (*testing.CASES, *testing.FEATURE_CASES) if case.name in testing.SHORT]


@dataclass(frozen=True)
class Problem:
    """Something that launches our kernels: run(*arguments), on CPU tensors. Its results are whatever memory held."""

    name: str
    run: Callable
    arguments: tuple = ()


def attention(shape: Shape, backend: str) -> Problem:
    """Forward and backward of a shape, as runner.py times and verifies it."""
    return Problem(f"{shape.name} {backend}", _attend, (shape, backend))


def check(case: testing.Case, backend: str) -> Problem:
    """Forward and backward of a case, as testing.check runs it on a GPU."""
    return Problem(f"{case.name} {backend}", _check, (case, backend))


def candidate(one: tuning.Candidate) -> Problem:
    """Tiles that tuning.py times."""
    return Problem(one.name, tuning.launch, (one, torch.device("cpu")))


def smoke_form(form: str) -> Problem:
    """What smoke.py tries."""
    return Problem(f"{form} smoke", _smoke, (form,))


def fault(one: peer_faults.Fault, backend: str) -> Problem:
    """Where a peer gives NaN."""
    return Problem(f"{one.name} {backend}", _fault, (one, backend))


def first_call() -> Iterator[Problem]:
    """What `make gpu CALL=1` runs, what takes longest to compile first: all features at once, then the kernels for Hopper."""
    yield from (check(case, "portable") for case in reversed(FEATURES))
    yield from map(smoke_form, smoke.FORMS)
    yield from (attention(shape, "portable") for shape in shapes.GPU_SHAPES)


def second_call() -> Iterator[Problem]:
    """CALL=2, but for its tests, which compile on their own many cores."""
    yield from (check(case, "portable") for case in reversed(FEATURES))
    yield from (attention(shape, backend) for backend in repeats.BACKENDS for shape in shapes.GPU_SHAPES)
    yield from (fault(one, backend) for backend in repeats.BACKENDS for one in peer_faults.FAULTS)


def third_call() -> Iterator[Problem]:
    """CALL=3: tiles in the order in which tuning.py wants them; then what the sanitizer, models and long sequences run."""
    yield from map(candidate, tuning.cases())
    yield from map(smoke_form, smoke.FORMS)
    yield from (attention(shape, backend) for backend in repeats.BACKENDS for shape in shapes.GPU_SHAPES)
    yield from (check(case, "portable") for case in sanitized.PORTABLE)


def _smoke(form: str) -> None:
    with smoke.forced(form):
        _check(smoke.FORMS[form], "hopper")


def _fault(one: peer_faults.Fault, backend: str) -> None:
    peer_faults.results(functools.partial(tfkern.attention, backend=backend), one.inputs(torch.bfloat16))


def _attend(shape: Shape, backend: str) -> None:
    q, k, v, do = shape.memory(torch.bfloat16, "cpu")
    out = tfkern.attention(q, k, v, is_causal=shape.is_causal, backend=backend)
    torch.autograd.grad(out, (q, k, v), do)


def _check(case: testing.Case, backend: str) -> None:
    attention = tfkern.attention_varlen if case.lengths else tfkern.attention
    testing.results(attention, testing.make_inputs(case, torch.bfloat16), backend=backend)


def cases(problems: Iterable[Problem]) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    """(name, function that compiles it and gives a row with the seconds) of every kernel that problems launch, each once."""
    fake_gpu.install(Driver(90, lambda *_: None))
    found: dict[str, Problem] = {}
    for problem in problems:
        try:
            names = _launched(problem)
        except tfkern.UnsupportedError as error:  # declined, so that the real run launches nothing either
            yield problem.name, functools.partial(iter, [dict(skipped=passed_over(problem.name, error))])
            continue
        except Exception as error:  # one problem's fault must not take the others' kernels away
            yield problem.name, functools.partial(iter, [dict(problem=faults.line(error))])
            continue
        for name in names:
            found.setdefault(name, problem)
    for name, problem in found.items():
        yield name, functools.partial(_compile, name, problem)


class Driver(fake_gpu.Driver):
    """Compiles also the C that Triton launches a kernel with, which Triton keeps on disk, too: with 3.6 each has its own."""

    def launcher_cls(self, src, metadata):
        driver = compat_triton.nvidia_driver()
        try:
            driver.library_dirs()
        except AssertionError:  # no libcuda to link with, so that nothing will be launched here
            return self.launcher
        driver.CudaUtils()
        if hasattr(driver, "make_launcher"):
            driver.CudaLauncher(src, metadata)
        return self.launcher


def _launched(problem: Problem) -> list[str]:
    """What a problem launches, without compiling it."""
    names = []
    _run(problem, lambda *launched, **tensors: names.append(identity(*launched, **tensors)))
    return names


def _compile(name: str, problem: Problem) -> Iterator[dict]:
    start, compiled = time.perf_counter(), []

    def only(one: launch.Launch, features: tuple, feature_tensors: tuple, **tensors: Tensor | None) -> None:
        if not compiled and identity(one, features, feature_tensors, **tensors) == name:
            one.by_jit(features, **tensors)
            compiled.append(one)

    try:
        _run(problem, only)
    except Exception as error:
        if not (_is_tried(problem) and faults.is_compilers(error)):
            raise
        yield dict(problem_of=problem.name, skipped=faults.line(error))
        return
    row = dict(problem_of=problem.name, seconds=round(time.perf_counter() - start, 1))
    yield row if compiled else {**row, "problem": "was not launched again"}


def _is_tried(problem: Problem) -> bool:
    """Whether its tiles are a candidate that no table has: that they need too much is a result."""
    return problem.run is tuning.launch and not problem.arguments[0].own


def _run(problem: Problem, instead: Callable) -> None:
    with launches.watched(instead):
        problem.run(*problem.arguments)


def identity(one: launch.Launch, features: tuple, feature_tensors: tuple, **tensors: Tensor | None) -> str:
    """The name of a kernel with its tiles, and a digest of all that it is compiled for, the same in every process."""
    constants = [(key, getattr(value, "__name__", value)) for key, value in one.constants.items()]
    what = _kind((one.ordered(tensors), features, one.numbers)), one.blocks, constants, sorted(one.options.items())
    return f"{launches.name(one)} #{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"


def _kind(x) -> object:
    """What the compiler is told of an argument."""
    if isinstance(x, tuple):
        return tuple(map(_kind, x))
    if isinstance(x, Tensor):
        return str(x.dtype), x.data_ptr() % launch.ALIGNMENT == 0
    if isinstance(x, int):
        return "i32" if -(2**31) <= x < 2**31 else "i64"
    return type(x).__name__
