"""Verify, then time, forward and forward with backward. The verified call is the timed one, at its own size; a provider
with wrong results is not timed."""

import datetime
import importlib.metadata
import itertools
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

import tfkern
from tfkern.bench import launches, timing, verify
from tfkern.bench.providers import PROVIDERS, UnavailableError, default_choice, is_ours, passed_over
from tfkern.bench.shapes import CPU_SHAPES, GPU_SHAPES, Shape
from tfkern.progress import counted


def machine() -> dict:
    """What the figures depend on: the device, versions, the date."""
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
    """The output of a program, or None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def folder_name(device: str) -> str:
    """A GPU's name as a folder: "h100-80gb-hbm3"."""
    return "-".join(word for word in device.lower().replace("nvidia", "").split())


def run(dtype: torch.dtype, device: torch.device, seconds: float = 0.3, providers=None) -> Iterator[dict]:
    """A row for each shape, direction and provider: medians in ms with the 20th and 80th percentile, or why there is none."""
    asked = itertools.product(GPU_SHAPES if device.type == "cuda" else CPU_SHAPES, providers or PROVIDERS)
    for shape, name in counted(asked, lambda one: f"{one[0].name}, {one[1]}"):
        if name == "tfkern portable" and device.type == "cpu":
            reason = "Triton's interpreter is for checking, not for timing"
            yield dict(shape=shape.name, provider=name, skipped=reason)
            continue
        yield from figures(name, shape, dtype, device, seconds)


def figures(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float, graphs: bool = False
) -> Iterator[dict]:
    """The rows of one provider on one shape; with `graphs` replayed from a CUDA graph, without the Python around it. A peer
    that fails is a row that says so; what we do wrong is a `problem`, or raises."""
    row = dict(shape=shape.name, provider=name, graph=graphs)
    try:
        if graphs and device.type != "cuda":
            raise UnavailableError("there are no CUDA graphs without a GPU")
        function = PROVIDERS[name](shape, dtype, device)
        with timing.stream(graphs):
            tensors = verify.inputs(shape, dtype, device)
            right = verify.oracle(shape, dtype, device)
            for direction, call in calls(function, *tensors).items():
                kernels = _kernels(name, call, tensors, shape)
                timed = timing.replayed(call) if graphs else call
                about = {**row, "direction": direction, "kernels": kernels}
                if wrong := [str(e) for e in verify.worst(timing.again(timed), right) if not e.ok]:
                    yield {**about, **_wrong(name, "; ".join(wrong))}
                    continue
                p20, p50, p80 = timing.milliseconds(timed, device, seconds)
                yield {**about, "ms": p50, "p20": p20, "p80": p80, "tflops": shape.flops(direction) / p50 / 1e9}
    except Exception as error:
        yield {**row, "skipped": passed_over(name, error)}


def _wrong(provider: str, what: str) -> dict:
    """The rest of a row whose results are wrong, in the place of times."""
    return {"problem" if is_ours(provider) else "skipped": f"wrong results: {what}"}


def _kernels(name: str, call: timing.Call, tensors, shape: Shape) -> list[str]:
    """What a call runs, where that can be asked: our kernels, and PyTorch's choice of a backend."""
    with launches.watched() as seen:
        call()
    if name == "sdpa default":
        return [default_choice(*tensors[:3], is_causal=shape.is_causal)]
    return [launches.name(one) for one in seen]


def calls(function, q, k, v, do) -> dict[str, timing.Call]:
    """What is timed. Forward runs without autograd, as in inference; backward from one forward's graph."""

    def forward() -> dict:
        with torch.no_grad():
            return {"out": function(q, k, v)}

    def gradients(out, **options) -> dict:
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), do, **options), strict=True))

    out = function(q, k, v)
    return {
        "forward": forward,
        "backward": lambda: gradients(out, retain_graph=True),
        "forward+backward": lambda: gradients(function(q, k, v)),
    }


def peak_memory(name: str, length: int, dtype: torch.dtype, device: torch.device) -> Iterator[dict]:
    """Bytes beyond the inputs that a forward and a backward of one head group take at their peak."""
    shape, row = Shape(f"memory-{length}", 1, 8, length, 64), dict(provider=name, length=length)
    try:
        function = PROVIDERS[name](shape, dtype, device)
        q, k, v, do = shape.inputs(dtype, device)
        if device.type != "cuda":
            torch.autograd.grad(function(q, k, v), (q, k, v), do)
            raise UnavailableError("there is no GPU whose memory could be measured")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(q, k, v), (q, k, v), do)
        torch.cuda.synchronize()
        yield {**row, "bytes": torch.cuda.max_memory_allocated() - before}
    except Exception as error:
        yield {**row, "skipped": passed_over(name, error)}


def save(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + "\n")
