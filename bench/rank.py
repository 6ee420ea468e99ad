#!/usr/bin/env python3
"""Rank the candidates of tile sizes by the cost model and keep the best few of each kernel in ranked.json, for `make gpu`.

usage: rank.py [--kernel "portable flash_fwd" …] [--head-dim 64 128]

Kernels that are not named keep what the file has. Needs no GPU; a kernel takes minutes, as every candidate is compiled.
"""

import argparse
import datetime
import json
import math
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
import aot
import candidates
import compile_gate
import cost_model
import geometry
import hopper_model
import sweep

DTYPE, VARIANTS = "bf16", ["plain", "causal"]


def portable(kernel: str, head_dim: int) -> list[tuple[float, list]]:
    """(rank, tiles) of the candidates that compile and fit, the best first."""
    config = compile_gate.load("tfkern.configs").TileConfig

    def ranked(tiles, variants) -> list[tuple[float, list]]:
        rows = [sweep.evaluate(kernel, "sm_90", DTYPE, head_dim, variants, config(*numbers)) for numbers in tiles]
        found = [(row["rank"], list(numbers)) for row, numbers in zip(rows, tiles, strict=True)]
        return sorted(one for one in found if math.isfinite(one[0]))

    first = ranked(candidates.of(kernel), VARIANTS[:1])  # all of them by all variants would take twice as long
    return ranked([numbers for _, numbers in first[: 2 * candidates.BEST]], VARIANTS)


def hopper(kernel: str, head_dim: int) -> list[tuple[float, list]]:
    """The same of a kernel for Hopper, which has few."""
    tiles, found = compile_gate.load("tfkern.tiles"), []
    for numbers in candidates.HOPPER[kernel]:
        config = (tiles.HopperOnePass if kernel == "flash_bwd" else tiles.HopperConfig)(*numbers)
        try:
            ratios = [ratio for v in VARIANTS for p in sweep.problems(head_dim, v) if (ratio := _ratio(kernel, config, p))]
        except Exception as error:  # whatever the compiler throws: this is no candidate
            print(f"{kernel} {numbers}: {error!r}"[:300], file=sys.stderr)
            continue
        if ratios:
            found.append((math.exp(sum(map(math.log, ratios)) / len(ratios)), list(numbers)))
    return sorted(found)


def _ratio(kernel: str, config, p: geometry.Problem) -> float | None:
    """The predicted time beside the floor; None where the kernel would not take the problem."""
    tiles = compile_gate.load("tfkern.tiles")
    if kernel.startswith("flash_fwd"):
        short = kernel == "flash_fwd_short"
        if short and p.length > config.stages * config.block_n:
            return None
        predicted, of = hopper_model.predict_with(config, short, p, DTYPE), "flash_fwd"
    elif kernel == "flash_bwd":
        with mock.patch.dict(tiles.HOPPER_ONE_PASS, {p.head_dim: (config,)}):
            predicted, of = hopper_model.one_launch(p, DTYPE), "flash_bwd_one_pass"
    else:
        table = tiles.HOPPER_BACKWARD[kernel]
        with mock.patch.dict(table, {p.head_dim: tiles.HopperBackwardTiles(config, config, config)}):
            predicted, of = hopper_model.of_two(p, DTYPE, kernel), kernel
    return predicted.microseconds / geometry.floor(of, p, cost_model.H100) if predicted else None


def has(backend: str, kernel: str, head_dim: int) -> bool:
    """Whether the table has tiles for a kernel and head dim."""
    tiles, configs = compile_gate.load("tfkern.tiles"), compile_gate.load("tfkern.configs")
    if backend == "portable":
        return kernel != configs.ONE_PASS or bool(configs.one_pass_tiles("sm_90", 2, head_dim))
    if kernel == "flash_bwd":
        return head_dim in tiles.HOPPER_ONE_PASS
    return kernel != "flash_fwd_short" or tiles.HOPPER[head_dim].short is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [" ".join(pair) for pair in candidates.KERNELS]
    parser.add_argument("--kernel", nargs="+", default=names, choices=names)
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    args = parser.parse_args()
    kept = json.loads(candidates.RANKED.read_text())["best"] if candidates.RANKED.exists() else {}
    for head_dim in args.head_dim:
        for name in args.kernel:
            backend, kernel = name.split()
            if has(backend, kernel, head_dim):
                ranked = (hopper if backend == "hopper" else portable)(kernel, head_dim)
                kept[f"{name} {head_dim}"] = [numbers for _, numbers in ranked[: candidates.BEST]]
                print(name, head_dim, *(f"{numbers}: {rank:.2f}" for rank, numbers in ranked[: candidates.BEST]), flush=True)
                source = f"bench/rank.py, Triton {aot.triton.__version__}, {datetime.date.today()}; an estimate"
                text = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(kept.items()))
                candidates.RANKED.write_text(f'{{"source": {json.dumps(source)}, "best": {{\n  {text}\n}}}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
