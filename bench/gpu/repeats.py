"""Check that the same inputs give the same bits in many repeats, by the portable kernels and by those for Hopper."""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import tfkern
from tfkern import testing
from tfkern.bench import launches, verify
from tfkern.bench.providers import passed_over
from tfkern.bench.shapes import Shape

TIMES = 100
BACKENDS = ("hopper", "portable")


def cases(
    shapes: Iterable[Shape], features: Iterable[testing.Case], dtype: torch.dtype, device: torch.device, times: int = TIMES
) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    """Yield (name, function that makes its row): for each shape by each backend, then for each case of `features` by the
    portable one."""
    for shape in shapes:
        for backend in BACKENDS:
            yield (
                f"{shape.name} {backend}",
                functools.partial(rows, functools.partial(_shape, shape, backend, dtype, device), times),
            )
    for case in features:
        yield f"{case.name} portable", functools.partial(rows, functools.partial(_case, case, dtype, device), times)


def rows(make: Callable[[], Callable[[], dict[str, Tensor]]], times: int) -> Iterator[dict]:
    """Yield one row: the kernels that ran, and whether `times` repeats of the function that `make` returns give the bits of its
    first run. The first result that differs is a `problem`. If the function cannot run, the row has the reason as `skipped`."""
    try:
        run = make()
        with launches.watched() as seen:
            first = run()
    except RuntimeError as error:
        yield dict(skipped=passed_over("tfkern", error))
        return
    row = dict(kernels=[launches.name(one) for one in seen])
    for index in range(times):
        again = run()
        if differ := [name for name in first if not torch.equal(_bits(first[name]), _bits(again[name]))]:
            yield {**row, "problem": f"{', '.join(differ)} differ in repeat {index + 1}"}
            return
    yield {**row, "repeats": times}


def _bits(x: Tensor) -> Tensor:
    """The bytes of a tensor. Compared as bytes, equal NaNs are equal."""
    return x.detach().contiguous().view(torch.uint8)


def _shape(shape: Shape, backend: str, dtype: torch.dtype, device: torch.device) -> Callable[[], dict[str, Tensor]]:
    q, k, v, do = verify.inputs(shape, dtype, device)

    def run() -> dict[str, Tensor]:
        out = tfkern.attention(q, k, v, is_causal=shape.is_causal, backend=backend)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, (q, k, v), do)), strict=True))

    return run


def _case(case: testing.Case, dtype: torch.dtype, device: torch.device) -> Callable[[], dict[str, Tensor]]:
    function = tfkern.attention_varlen if case.lengths else tfkern.attention
    return functools.partial(testing.results, function, testing.make_inputs(case, dtype, device), backend="portable")
