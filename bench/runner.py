"""Verify, then time: forward, and forward with backward. A provider whose results are wrong is not timed."""

import dataclasses
import datetime
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import tfkern
from tfkern import reference, testing
from tfkern.bench.providers import PROVIDERS, UnavailableError
from tfkern.bench.shapes import CPU_SHAPES, GPU_SHAPES, Shape

VERIFY_HEADS = 2  # the oracle is N x N in float64: 4.3 GB a tensor at the longest


def machine() -> dict:
    """What the figures hang on: the device, versions, the date."""
    about = dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), tfkern=tfkern.__version__,
        torch=torch.__version__, python=platform.python_version(), device="cpu", threads=torch.get_num_threads(),
    )  # fmt: skip
    if torch.cuda.is_available():
        about.update(device=torch.cuda.get_device_name(), cuda=torch.version.cuda)
    return about


def run(dtype: torch.dtype, device: torch.device, seconds: float = 0.3, providers=None) -> Iterator[dict]:
    """A row for each shape, direction and provider: medians in ms with the 20th and 80th percentile, or why there is none."""
    for shape in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        for name in providers or PROVIDERS:
            try:
                yield from figures(name, shape, dtype, device, seconds)
            except UnavailableError as reason:
                yield dict(shape=shape.name, provider=name, skipped=str(reason))
            except RuntimeError as error:  # out of memory among them: one provider's failure is its row, not the end
                yield dict(shape=shape.name, provider=name, skipped=f"failed: {str(error).splitlines()[0]}")


def figures(name: str, shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float) -> Iterator[dict]:
    """The rows of one provider on one shape. UnavailableError where it can't be had or is wrong."""
    function = PROVIDERS[name](shape, dtype, device)
    if wrong := [str(e) for e in verify(function, shape, dtype, device) if not e.ok]:
        raise UnavailableError("wrong results: " + "; ".join(wrong))
    for direction, call in calls(function, shape, dtype, device).items():
        p20, p50, p80 = time_it(call, device, seconds)
        tflops = shape.flops(direction != "forward") / p50 / 1e9
        yield dict(shape=shape.name, direction=direction, provider=name, ms=p50, p20=p20, p80=p80, tflops=tflops)


def calls(function, shape: Shape, dtype, device) -> dict[str, Callable[[], object]]:
    """What is timed. Forward runs without autograd, as in inference."""
    q, k, v, do = shape.inputs(dtype, device)

    def forward():
        with torch.no_grad():
            return function(q, k, v)

    def both():
        return torch.autograd.grad(function(q, k, v), (q, k, v), do)

    return {"forward": forward, "forward+backward": both}


def verify(function, shape: Shape, dtype, device) -> list[testing.Error]:
    """Out and gradients against the float64 oracle, at the shape's own length, on a few heads of one batch."""
    q, k, v, do = dataclasses.replace(shape, batch=1, heads=VERIFY_HEADS).inputs(dtype, device)

    def results(f, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = f(*tensors)
        grads = torch.autograd.grad(out, tensors, do.to(out.dtype))
        return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))

    naive = functools.partial(reference.attention, is_causal=shape.is_causal)
    plains = [results(naive, q, k, v)]
    if dtype == torch.float32:
        plains.append(results(functools.partial(reference.flash, is_causal=shape.is_causal), q, k, v))
    return testing.judge(results(function, q, k, v), results(naive, q.double(), k.double(), v.double()), plains)


def time_it(call: Callable[[], object], device: torch.device, seconds: float) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile in ms, over about `seconds` after a warm-up."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(call, warmup=25, rep=int(seconds * 1000), quantiles=[0.2, 0.5, 0.8]))
    call()
    times = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        times.append((time.perf_counter() - before) * 1e3)
    fifths = statistics.quantiles(times, n=5)
    return fifths[0], statistics.median(times), fifths[3]


def save(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + "\n")
