"""Compile the kernels of a run ahead of it, in several processes, without using a GPU.

A problem takes the same path as in the real run, up to the driver. In place of the driver, fake_gpu.py gives the properties of
an H100. So a kernel gets the same options and argument types, and Triton caches it on disk under the same key. The key is made
of Triton's sources, the kernel's, the types and alignment of the arguments, constants, options, the target (sm_90), the version
of ptxas, and some environment variables. The real run, in the same environment, finds the kernel in the cache.
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
    """A call, run(*arguments), that launches our kernels on CPU tensors. Its results are undefined, since no kernel runs."""

    name: str
    run: Callable
    arguments: tuple = ()


def attention(shape: Shape, backend: str) -> Problem:
    """The forward and backward of a shape, as runner.py times and verifies them."""
    return Problem(f"{shape.name} {backend}", _attend, (shape, backend))


def check(case: testing.Case, backend: str) -> Problem:
    """The forward and backward of a case, as testing.check runs them on a GPU."""
    return Problem(f"{case.name} {backend}", _check, (case, backend))


def candidate(one: tuning.Candidate) -> Problem:
    """The pass that tuning.py times for a candidate of tiles."""
    return Problem(one.name, tuning.launch, (one, torch.device("cpu")))


def smoke_form(form: str) -> Problem:
    """The problem that smoke.py runs for a form."""
    return Problem(f"{form} smoke", _smoke, (form,))


def fault(one: peer_faults.Fault, backend: str) -> Problem:
    """The forward and backward of a problem of peer_faults.py."""
    return Problem(f"{one.name} {backend}", _fault, (one, backend))


def first_call() -> Iterator[Problem]:
    """Yield the problems of `make gpu CALL=1`, those that take longest to compile first: features, the case with all of them
    foremost, then the kernels for Hopper, then plain shapes."""
    yield from (check(case, "portable") for case in reversed(FEATURES))
    yield from map(smoke_form, smoke.FORMS)
    yield from (attention(shape, "portable") for shape in shapes.GPU_SHAPES)


def second_call() -> Iterator[Problem]:
    """Yield the problems of `make gpu CALL=2`, without those of its tests, which run and compile in many processes
    themselves."""
    yield from (check(case, "portable") for case in reversed(FEATURES))
    yield from (attention(shape, backend) for backend in repeats.BACKENDS for shape in shapes.GPU_SHAPES)
    yield from (fault(one, backend) for backend in repeats.BACKENDS for one in peer_faults.FAULTS)


def third_call() -> Iterator[Problem]:
    """Yield the problems of `make gpu CALL=3`: candidates of tiles in the order in which tuning.py times them, then what the
    other steps run."""
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
    """Yield (name, function that compiles it and yields a row with the seconds) for every kernel that the problems launch,
    once a kernel. A problem that is declined or fails is a case of its own, with the reason."""
    fake_gpu.install(Driver(90, lambda *_: None))
    found: dict[str, Problem] = {}
    for problem in problems:
        try:
            names = _launched(problem)
        except tfkern.UnsupportedError as error:  # the real run launches nothing either
            yield problem.name, functools.partial(iter, [dict(skipped=passed_over(problem.name, error))])
            continue
        except Exception as error:  # the kernels of the other problems are still compiled
            yield problem.name, functools.partial(iter, [dict(problem=faults.line(error))])
            continue
        for name in names:
            found.setdefault(name, problem)
    for name, problem in found.items():
        yield name, functools.partial(_compile, name, problem)


class Driver(fake_gpu.Driver):
    """A fake driver that also compiles the C code with which Triton launches a kernel. Triton caches that on disk too; with
    Triton 3.6 each kernel has its own."""

    def launcher_cls(self, src, metadata):
        driver = compat_triton.nvidia_driver()
        try:
            driver.library_dirs()
        except AssertionError:  # there is no libcuda to link with, so nothing is launched on this machine
            return self.launcher
        driver.CudaUtils()
        if hasattr(driver, "make_launcher"):
            driver.CudaLauncher(src, metadata)
        return self.launcher


def _launched(problem: Problem) -> list[str]:
    """The names (see identity) of the kernels that a problem launches. Nothing is compiled."""
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
    """Whether a problem is a candidate of tiles that is not in the table. The compiler may refuse those."""
    return problem.run is tuning.launch and not problem.arguments[0].own


def _run(problem: Problem, instead: Callable) -> None:
    with launches.watched(instead):
        problem.run(*problem.arguments)


def identity(one: launch.Launch, features: tuple, feature_tensors: tuple, **tensors: Tensor | None) -> str:
    """The name of a kernel with its tiles, and a digest of all that it is compiled for. It is the same in every process."""
    constants = [(key, getattr(value, "__name__", value)) for key, value in one.constants.items()]
    what = _kind((one.ordered(tensors), features, one.numbers)), one.blocks, constants, sorted(one.options.items())
    return f"{launches.name(one)} #{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"


def _kind(x) -> object:
    """The properties of an argument for which the compiler specialises a kernel: type, and alignment of a tensor."""
    if isinstance(x, tuple):
        return tuple(map(_kind, x))
    if isinstance(x, Tensor):
        return str(x.dtype), x.data_ptr() % launch.ALIGNMENT == 0
    if isinstance(x, int):
        return "i32" if -(2**31) <= x < 2**31 else "i64"
    return type(x).__name__
