"""A pytest-benchmark suite over the shapes and providers of `tfkern bench`.

Run it by `make bench-suite`, or `pytest bench/suite --benchmark-only`.

Every function is verified before it is timed. The timed function includes the synchronisation with the GPU.
"""

import pytest
import torch

from tfkern.bench import runner, timing, verify
from tfkern.bench.providers import PROVIDERS, UnavailableError
from tfkern.bench.shapes import CPU_SHAPES, GPU_SHAPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SHAPES = {shape.name: shape for shape in (GPU_SHAPES if DEVICE.type == "cuda" else CPU_SHAPES)}


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_speed(benchmark, shape, provider, direction):
    shape = SHAPES[shape]
    try:
        function = PROVIDERS[provider](shape, DTYPE, DEVICE)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    call = runner.calls(function, *verify.inputs(shape, DTYPE, DEVICE))[direction]
    errors = verify.worst(timing.again(call), verify.oracle(shape, DTYPE, DEVICE))
    assert all(e.ok for e in errors), "\n".join(map(str, errors))

    def synchronised():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=5, iterations=1, warmup_rounds=1)
    seconds, least = benchmark.stats.stats.median, shape.bytes(direction, DTYPE.itemsize)
    benchmark.extra_info.update(
        tflops=shape.flops(direction) / seconds / 1e12, bytes=least, gigabytes_per_second=least / seconds / 1e9,
        direction=direction, provider=provider,
    )  # fmt: skip
