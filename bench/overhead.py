"""What a call costs before the GPU has anything to do: microseconds of Python, measured without a GPU.

Kernels are compiled for one that is not there and launched into nothing (fake_gpu.py), so that what is timed is Triton's and
our own Python around the C launcher (which itself takes 2 to 4 microseconds more). PyTorch's attention on tiny CPU tensors
stands beside it: its dispatch and autograd cost the same on a CPU, and its arithmetic is next to nothing.

usage: tfkern bench overhead
"""

import math
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import tfkern
from tfkern import launch
from tfkern.bench import fake_gpu


def microseconds(call: Callable[[], object], calls: int = 400, rounds: int = 9) -> float:
    """The best round's mean: what stands between the rounds is other people's work."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def rows(device: torch.device, heads: int = 3, length: int = 16, head_dim: int = 64) -> list[tuple[str, float, float, float]]:
    """(who, forward without grad, forward with grad, forward and backward) in microseconds; on a GPU the C launcher's included,
    which is as long as the GPU keeps up."""
    if device.type == "cpu":
        fake_gpu.pretend()
    torch.set_num_threads(1)
    q, k, v = (torch.zeros(2, heads, length, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = torch.zeros(length, length, device=device)

    def figures(function) -> tuple[float, float, float]:
        do = torch.zeros_like(function(q, k, v))
        return (
            microseconds(lambda: function(q, k, v)),
            microseconds(lambda: function(*leaves)),
            microseconds(lambda: torch.autograd.grad(function(*leaves), leaves, do)),
        )

    def new_length() -> None:
        n = lengths.pop()
        tfkern.attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])

    found = [("tfkern.attention", *figures(tfkern.attention))]
    found.append(("… causal", *figures(lambda *t: tfkern.attention(*t, is_causal=True))))
    found.append(("… with a bias", *figures(lambda *t: tfkern.attention(*t, mask))))
    found.append(("… with dropout", *figures(lambda *t: tfkern.attention(*t, dropout_p=0.1))))
    q, k, v = (torch.zeros(2, heads, 2000, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))
    lengths = list(range(1, 1901))
    found.append(("… of a length not seen before", microseconds(new_length, calls=200), float("nan"), float("nan")))
    q, k, v = (x[:, :, :length].contiguous() for x in (q, k, v))
    ours, launch.Launch.__call__ = launch.Launch.__call__, lambda self, tensors, features, _: self.by_jit(tensors, features)
    found.append(("… launched by Triton's JIT", *figures(tfkern.attention)))
    launch.Launch.__call__ = ours
    found.append((f"F.scaled_dot_product_attention ({device.type})", *figures(F.scaled_dot_product_attention)))
    return found


def table(found) -> str:
    """The rows as Markdown."""
    lines = ["| microseconds a call | no grad | forward, grad | forward + backward |", "| --- | --- | --- | --- |"]
    lines += [f"| {who} | " + " | ".join("" if math.isnan(x) else f"{x:.1f}" for x in xs) + " |" for who, *xs in found]
    return "\n".join(lines)


def main() -> None:
    print(table(rows(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
