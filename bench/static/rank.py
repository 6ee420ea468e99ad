"""Rank the candidates of tile sizes by the cost model and keep the best few of each kernel in ranked.json, for `make gpu`.

usage: python -m bench.static.rank [--kernel "portable flash_fwd" …] [--head-dim 64 128] [--store FILE] [--seconds N]

Kernels that are not named keep their entries in the file. Needs no GPU. A kernel takes minutes, since its candidates are
compiled. --store names a store of sweep.py, whose candidates are not compiled again. After --seconds no further portable
candidates are compiled, and the portable kernels are ranked by those that are known.
"""

import argparse
import contextlib
import datetime
import json
import math
import sys
import time
from pathlib import Path
from unittest import mock

from tfkern import configs, tiles
from tfkern.bench.static import aot, candidates, geometry, hopper_model, sweep
from tfkern.ending import ended

DTYPE = "bf16"


def portable(known: sweep.Sweep, kernel: str, head_dim: int) -> list[tuple[float, tuple]]:
    """(rank in predicted microseconds, tiles) of all candidates that sweep.py evaluates, without a mask, best first."""
    row = sweep.Row("sm_90", kernel, DTYPE, head_dim)
    with contextlib.suppress(TimeoutError):
        known.run(row)
    seen = {tiles for at, tiles, variant in known.known if at == row and variant == "plain"}
    found = [(known.rank(row, tiles, ("plain",)), tiles) for tiles in candidates.of(kernel, head_dim) if tiles in seen]
    return sorted(one for one in found if math.isfinite(one[0]))


def hopper(kernel: str, head_dim: int) -> list[tuple[float, tuple]]:
    """(rank in predicted microseconds, tiles) of all candidates of a kernel for Hopper, best first. Candidates that do not
    compile are left out."""
    found = []
    row = sweep.Row("sm_90", kernel, DTYPE, head_dim)
    asked = [problem for variant in sweep.VARIANTS for problem in sweep.problems(row, variant)]
    for numbers in candidates.HOPPER[kernel]:
        config = (tiles.HopperOnePass if kernel == "flash_bwd" else tiles.HopperConfig)(*numbers)
        try:
            times = [us for problem in asked if (us := _microseconds(kernel, config, problem))]
        except Exception as error:  # any error of the compiler rules the candidate out
            print(f"{kernel} {numbers}: {error!r}"[:300], file=sys.stderr)
            continue
        if times:
            found.append((math.exp(sum(map(math.log, times)) / len(times)), numbers))
    return sorted(found)


def _microseconds(kernel: str, config, p: geometry.Problem) -> float | None:
    """The predicted microseconds of a kernel with given tiles. None where the kernel does not take the problem."""
    if kernel.startswith("flash_fwd"):
        short = kernel == "flash_fwd_short"
        if short and p.length > config.stages * config.block_n:
            return None
        predicted = hopper_model.predict_with(config, short, p, DTYPE)
    elif kernel == "flash_bwd":
        with mock.patch.dict(tiles.HOPPER_ONE_PASS, {p.head_dim: (config,)}):
            predicted = hopper_model.one_launch(p, DTYPE)
    else:
        table = tiles.HOPPER_BACKWARD[kernel]
        with mock.patch.dict(table, {p.head_dim: tiles.HopperBackwardTiles(config, config, config)}):
            predicted = hopper_model.of_two(p, DTYPE, kernel)
    return predicted.microseconds if predicted else None


def has(backend: str, kernel: str, head_dim: int) -> bool:
    """Whether tfkern/tiles.py has tiles for a kernel and a head dim on sm_90."""
    if backend == "portable":
        return kernel != configs.ONE_PASS or bool(configs.one_pass_tiles("sm_90", 2, head_dim))
    if kernel == "flash_bwd":
        return head_dim in tiles.HOPPER_ONE_PASS
    return kernel != "flash_fwd_short" or tiles.HOPPER[head_dim].short is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [" ".join(pair) for pair in candidates.KERNELS if pair[1] not in candidates.UNRANKED]
    parser.add_argument("--kernel", nargs="+", default=names, choices=names)
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf)
    args = parser.parse_args()
    known = sweep.Sweep(args.store, time.monotonic() + args.seconds)
    for head_dim in args.head_dim:
        for name in args.kernel:
            backend, kernel = name.split()
            if has(backend, kernel, head_dim):
                ranked = hopper(kernel, head_dim) if backend == "hopper" else portable(known, kernel, head_dim)
                best = ranked[: candidates.BEST]
                print(name, head_dim, *(f"{numbers}: {rank:.1f} us" for rank, numbers in best), flush=True)
                if best:
                    keep(f"{name} {head_dim}", [list(numbers) for _, numbers in best])
    return 0


def keep(key: str, best: list[list]) -> None:
    """Write the best tiles of a kernel and head dim to ranked.json, under `key`."""
    kept = json.loads(candidates.RANKED.read_text())["best"] if candidates.RANKED.exists() else {}
    kept[key] = best
    source = f"bench/static/rank.py, Triton {aot.triton.__version__}, {datetime.date.today()}; an estimate"
    text = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(kept.items()))
    candidates.RANKED.write_text(f'{{"source": {json.dumps(source)}, "best": {{\n  {text}\n}}}}\n')


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
