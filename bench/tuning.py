"""Tile sizes by time: every candidate of candidates.py, on the GPU that is there."""

import functools
from collections.abc import Iterator
from unittest import mock

import torch

from tfkern import backends, call, configs, tiles
from tfkern.bench import candidates, fake_gpu, runner
from tfkern.bench.shapes import Shape

SHAPES = [
    Shape("197", 64, 12, 197, 64), Shape("512", 64, 12, 512, 64), Shape("1024-causal", 8, 12, 1024, 64, is_causal=True),
    Shape("2048", 8, 12, 2048, 64), Shape("4096-causal-d128", 2, 16, 4096, 128, is_causal=True),
]  # fmt: skip
KERNELS = ("flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv")


def cases(first_only: bool = False) -> Iterator[tuple[tuple[str, Shape], configs.TileConfig]]:
    """((kernel, shape), tiles): the tiles of the table first, then the others."""
    for kernel in KERNELS:
        for shape in SHAPES:
            table = configs.tile_config("sm_90", kernel, 2, configs.head_dim_class(shape.head_dim))
            others = [configs.TileConfig(*tiles) for tiles in candidates.of(kernel)]
            for config in [table] if first_only else [table, *(c for c in others if c != table)]:
                yield (kernel, shape), config
            if first_only:
                break


def time_one(case: tuple[str, Shape], config: configs.TileConfig, device: torch.device, dry: bool) -> Iterator[dict]:
    """Milliseconds of the pass that the kernel belongs to, with the other kernels as in the table."""
    kernel, shape = case
    with configs.override(**{kernel: config}):
        yield from _time(kernel, shape, "portable", vars(config), device, dry)


def hopper_cases(
    first_only: bool = False,
) -> Iterator[tuple[tuple[str, Shape], tiles.HopperConfig | tiles.HopperOnePass]]:
    """The same of the kernels for Hopper."""
    for kernel, found in candidates.HOPPER.items():
        for shape in SHAPES[:1] if first_only else SHAPES:
            for config in found[:1] if first_only else found:
                yield (kernel, shape), (tiles.HopperOnePass if kernel == "flash_bwd" else tiles.HopperConfig)(*config)


def time_hopper(
    case: tuple[str, Shape], config: tiles.HopperConfig | tiles.HopperOnePass, device: torch.device, dry: bool
) -> Iterator[dict]:
    """As time_one, of a kernel for Hopper."""
    kernel, shape = case
    one = {}  # the backward in one launch is taken only where it is what is timed
    if kernel == "flash_bwd":
        table, found = one, (config,)
        if shape.head_dim > 64 or -(-shape.length // tiles.HOPPER_QUERIES) > config.tiles:
            yield dict(
                kernel=kernel, backend="hopper", shape=shape.name, **vars(config), skipped="has no memory for the queries"
            )
            return
    elif kernel.startswith("flash_fwd"):
        table, found = tiles.HOPPER, tiles.HOPPER[shape.head_dim].alone(config, kernel == "flash_fwd_short")
    else:
        table, found = tiles.HOPPER_BACKWARD[kernel], tiles.HopperBackwardTiles(config, config, config)
    with (
        mock.patch.dict(table, {shape.head_dim: found}),
        mock.patch.dict(tiles.HOPPER_ONE_PASS, one, clear=True),
        mock.patch.dict(call._problems, clear=True),  # they keep their plans
    ):
        yield from _time(kernel, shape, "hopper", vars(config), device, dry)


def _time(kernel: str, shape: Shape, name: str, config: dict, device: torch.device, dry: bool) -> Iterator[dict]:
    if dry:
        fake_gpu.pretend()
    q, k, v, do = shape.inputs(torch.bfloat16, device)
    problem, tensors = call.build(q, k, v, is_causal=shape.is_causal)
    backend = backends.BACKENDS[name] if dry else backends.choose(problem, name)
    row = dict(kernel=kernel, backend=name, shape=shape.name, **config)
    try:
        with torch.no_grad():
            out, lse = backend.forward(problem, tensors)
            run = functools.partial(backend.forward, problem, tensors)
            if kernel.startswith("flash_bwd"):
                needed = (True,) * 3 + (False,) * 3  # the gradients of q, k and v
                run = functools.partial(backend.backward, problem, tensors, out, lse, do, None, needed)
            run()
            yield {**row, "ms": None if dry else runner.time_it(run, device, 0.03)[1]}
    except Exception as error:  # too much shared memory, registers …: not a candidate
        yield {**row, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
