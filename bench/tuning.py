"""Tile sizes by time: every candidate of sweep.py, on the GPU that is there."""

from collections.abc import Iterator

import torch

from tfkern import backends, call, configs
from tfkern.bench import fake_gpu, runner
from tfkern.bench.shapes import Shape

SHAPES = [
    Shape("197", 64, 12, 197, 64), Shape("512", 64, 12, 512, 64), Shape("1024-causal", 8, 12, 1024, 64, is_causal=True),
    Shape("2048", 8, 12, 2048, 64), Shape("4096-causal-d128", 2, 16, 4096, 128, is_causal=True),
]  # fmt: skip
TILES = {
    "flash_fwd": [(m, n) for m in (64, 128, 256) for n in (32, 64, 128)],
    "flash_bwd_dq": [(m, n) for m in (64, 128) for n in (32, 64, 128)],
    "flash_bwd_dkdv": [(m, n) for m in (32, 64, 128) for n in (64, 128)],
}


def candidates(first_only: bool = False) -> Iterator[tuple[tuple[str, Shape], configs.TileConfig]]:
    """((kernel, shape), tiles): the tiles of the table first, then the others."""
    for kernel, tiles in TILES.items():
        for shape in SHAPES:
            table = configs.tile_config("sm_90", kernel, 2, configs.head_dim_class(shape.head_dim))
            others = [configs.TileConfig(m, n, w, s) for m, n in tiles for w in (4, 8) for s in (1, 2, 3)]
            for config in [table] if first_only else [table, *(c for c in others if c != table)]:
                yield (kernel, shape), config
            if first_only:
                break


def time_one(case: tuple[str, Shape], config: configs.TileConfig, device: torch.device, dry: bool) -> Iterator[dict]:
    """Milliseconds of the pass that the kernel belongs to, with the other kernels as in the table."""
    kernel, shape = case
    if dry:
        fake_gpu.pretend()
    q, k, v, do = shape.inputs(torch.bfloat16, device)
    with configs.override(**{kernel: config}):
        problem, tensors = call.build(q, k, v, is_causal=shape.is_causal)
        backend = backends.choose(problem, "portable")
        row = dict(kernel=kernel, shape=shape.name, **vars(config))
        try:
            with torch.no_grad():
                out, lse = backend.forward(problem, tensors)
                if kernel == "flash_fwd":
                    run = lambda: backend.forward(problem, tensors)  # noqa: E731
                else:
                    run = lambda: backend.backward(problem, tensors, out, lse, do, None, (True,) * 3 + (False,) * 3)  # noqa: E731
                run()
                yield {**row, "ms": None if dry else runner.time_it(run, device, 0.03)[1]}
        except Exception as error:  # too much shared memory, registers …: not a candidate
            yield {**row, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
