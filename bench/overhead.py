"""What a call costs before the GPU has anything to do: microseconds of the CPU, measured without a GPU.

Kernels are compiled for an H100 that is not there, and launched by Triton's own C launcher into a driver that does nothing
(stub_gpu.py). PyTorch's attention on tiny CPU tensors stands beside it: its dispatch and autograd cost the same on a CPU, and
its arithmetic is next to nothing.

usage: tfkern bench overhead
"""

import math
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import tfkern
from tfkern import launch
from tfkern.backends import BACKENDS
from tfkern.bench import stub_gpu
from tfkern.call import build
from tfkern.ending import InputError, ended
from tfkern.progress import counted

Row = tuple[str, float, float, float]


def microseconds(calls: list[Callable], times: int = 10, rounds: int = 150, clock=time.perf_counter) -> list[float]:
    """The best round's mean of each, a round of each after the other. Rounds are shorter than the slices of time in which a
    busy machine turns to other people's work."""
    best = [float("inf")] * len(calls)
    for call in calls:
        for _ in range(20):
            call()
    for _ in counted(range(rounds), lambda _: "rounds of calls"):
        for i, call in enumerate(calls):
            call()  # fills the caches, which hold what ran before
            start = clock()
            for _ in range(times):
                call()
            best[i] = min(best[i], (clock() - start) / times)
    return [x * 1e6 for x in best]


def rows(device: torch.device, heads: int = 3, length: int = 16, head_dim: int = 64, rounds: int = 150) -> list[Row]:
    """(who, forward without grad, forward with grad, forward and backward) in microseconds; on a GPU while it keeps up."""
    if device.type == "cpu":
        if stub_gpu.compiler() is None:
            raise InputError("Triton's launcher needs a C compiler: install gcc, or name one in CC")
        stub_gpu.Stub()
    torch.set_num_threads(1)
    q, k, v = (torch.zeros(2, heads, length, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = torch.zeros(length, length, device=device)
    backends = ["portable"] + ["hopper"] * (launch.architecture(device) == "sm_90")

    def of(function) -> list[Callable]:
        do = torch.zeros_like(function(q, k, v))
        return [
            lambda: function(q, k, v),
            lambda: function(*leaves),
            lambda: torch.autograd.grad(function(*leaves), leaves, do),
        ]

    def ours(backend: str, **options) -> Callable:
        return lambda *tensors: tfkern.attention(*tensors, backend=backend, **options)

    found = []
    for what, options in (
        ("tfkern", {}), ("… causal", dict(is_causal=True)), ("… with dropout", dict(dropout_p=0.1)),
        ("… with a bias", dict(attn_mask=mask)),
    ):  # fmt: skip
        problem = build(q, k, v, **options)[0]
        able = [backend for backend in backends if not BACKENDS[backend].unsupported(problem, needs_grad=True)]
        found += [(f"{what}, {backend}", of(ours(backend, **options))) for backend in able]
    for backend in backends:
        found.append((f"… launched by Triton's JIT, {backend}", [_by_jit(call) for call in of(ours(backend))]))
    found.append((f"F.scaled_dot_product_attention ({device.type})", of(F.scaled_dot_product_attention)))
    figures = iter(microseconds([call for _, calls in found for call in calls], rounds=rounds))
    measured = [(who, *(next(figures) for _ in calls)) for who, calls in found]
    for backend in backends:
        new = _new_length(backend, heads, head_dim, device)
        measured.append((f"… of a length not seen before, {backend}", new, float("nan"), float("nan")))
    return measured


def _by_jit(call: Callable) -> Callable:
    """The call, with every launch through Triton's JIT."""

    def patched():
        launch.Launch.__call__ = lambda self, features, _, **tensors: self.by_jit(features, **tensors)
        try:
            return call()
        finally:
            launch.Launch.__call__ = ours

    ours = launch.Launch.__call__
    return patched


def _new_length(backend: str, heads: int, head_dim: int, device: torch.device) -> float:
    """Microseconds of a forward at a length not seen before."""
    lengths = list(range(1101, 1901))  # all with the same tiles
    q, k, v = (torch.zeros(2, heads, lengths[-1], head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))

    def call() -> None:
        n = lengths.pop()
        tfkern.attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], backend=backend)

    return microseconds([call], rounds=70)[0]


def table(found) -> str:
    """The rows as Markdown."""
    lines = ["| microseconds a call | no grad | forward, grad | forward + backward |", "| --- | --- | --- | --- |"]
    lines += [f"| {who} | " + " | ".join("" if math.isnan(x) else f"{x:.1f}" for x in xs) + " |" for who, *xs in found]
    return "\n".join(lines)


def main() -> int:
    print(table(rows(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
    return 0


if __name__ == "__main__":
    sys.exit(ended("overhead", main))
