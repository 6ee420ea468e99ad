"""Milliseconds of a call, by itself or replayed from a CUDA graph.

A graph holds what runs on the stream that is captured, and autograd runs a backward on the stream of its forward. So all of a
call that is captured (its inputs, the forward whose backward it is, the warm-up) has to have run within one `stream`.
"""

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

Call = Callable[[], dict[str, Tensor]]  # the timed function returns its results by name
WARM_UP = 3  # calls before a capture, in which compiling and allocating are not allowed


def stream(graphs: bool) -> contextlib.AbstractContextManager:
    """The stream for a call. A call that is to be captured gets its own, as the default stream can't be captured."""
    if not graphs:
        return contextlib.nullcontext()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)


def replayed(call: Call) -> Call:
    """The replay of a CUDA graph of a call; to be made and called within the `stream` that all of the call runs on. Its results
    are the same tensors each time."""
    for _ in range(WARM_UP):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = call()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay


def again(call: Call) -> dict[str, Tensor]:
    """The results of a second call. Those of the first are overwritten with NaN, so that nothing of it can be taken for them: a
    graph that holds nothing gives NaN."""
    for x in call().values():
        x.fill_(torch.nan)
    return call()


def milliseconds(call: Call, device: torch.device, seconds: float) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile over about `seconds` after a warm-up."""
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
