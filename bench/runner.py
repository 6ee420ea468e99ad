"""Verify, then time: forward, and forward with backward. A provider whose results are wrong is not timed."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
import statistics
import subprocess
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
        about.update(device=torch.cuda.get_device_name(), cuda=torch.version.cuda, triton=_version("triton"))
        about.update(
            clocks=_ask("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit", "--format=csv,noheader")
        )
    if commit := _ask("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"):
        about.update(commit=commit)
    return about


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask(*command: str) -> str | None:
    """What a program prints, or None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def folder_name(device: str) -> str:
    """A GPU's name as a folder: "h100-80gb-hbm3"."""
    return "-".join(word for word in device.lower().replace("nvidia", "").split())


def run(dtype: torch.dtype, device: torch.device, seconds: float = 0.3, providers=None) -> Iterator[dict]:
    """A row for each shape, direction and provider: medians in ms with the 20th and 80th percentile, or why there is none."""
    for shape in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        for name in providers or PROVIDERS:
            if name == "tfkern portable" and device.type == "cpu":
                reason = "Triton's interpreter is for checking, not for timing"
                yield dict(shape=shape.name, provider=name, skipped=reason)
                continue
            try:
                yield from figures(name, shape, dtype, device, seconds)
            except UnavailableError as reason:
                yield dict(shape=shape.name, provider=name, skipped=str(reason))


def figures(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float, graphs: bool = False
) -> Iterator[dict]:
    """The rows of one provider on one shape; with `graphs` replayed from a CUDA graph, without the Python around it.
    UnavailableError where it can't be had, fails, or is wrong."""
    if graphs and device.type != "cuda":
        raise UnavailableError("there are no CUDA graphs without a GPU")
    try:
        function = PROVIDERS[name](shape, dtype, device)
        if wrong := [str(e) for e in verify(function, shape, dtype, device) if not e.ok]:
            raise UnavailableError("wrong results: " + "; ".join(wrong))
        for direction, call in calls(function, shape, dtype, device).items():
            p20, p50, p80 = time_it(captured(call) if graphs else call, device, seconds)
            tflops = shape.flops(direction) / p50 / 1e9
            yield dict(
                shape=shape.name, direction=direction, provider=name, ms=p50, p20=p20, p80=p80, tflops=tflops, graph=graphs
            )
    except RuntimeError as error:  # out of memory among them: one provider's failure is its row, not the end
        if isinstance(error, UnavailableError):
            raise
        raise UnavailableError(f"failed: {str(error).splitlines()[0]}") from error


def calls(function, shape: Shape, dtype, device) -> dict[str, Callable[[], object]]:
    """What is timed. Forward runs without autograd, as in inference; backward from one forward's graph."""
    q, k, v, do = shape.inputs(dtype, device)

    def forward():
        with torch.no_grad():
            return function(q, k, v)

    out = function(q, k, v)
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True),
        "forward+backward": lambda: torch.autograd.grad(function(q, k, v), (q, k, v), do),
    }


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_memory(name: str, length: int, dtype: torch.dtype, device: torch.device) -> Iterator[dict]:
    """Bytes beyond the inputs that a forward and a backward of one head group take at their peak."""
    shape = Shape(f"memory-{length}", 1, 8, length, 64)
    function = PROVIDERS[name](shape, dtype, device)
    q, k, v, do = shape.inputs(dtype, device)
    if device.type != "cuda":
        torch.autograd.grad(function(q, k, v), (q, k, v), do)
        yield dict(provider=name, length=length, skipped="there is no GPU whose memory could be measured")
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(function(q, k, v), (q, k, v), do)
    torch.cuda.synchronize()
    yield dict(provider=name, length=length, bytes=torch.cuda.max_memory_allocated() - before)


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


def load_rows(path: Path) -> list[dict]:
    """The rows of a file that has one a line; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + "\n")
