#!/usr/bin/env python3
"""Compile every kernel that tfkern/configs.py can choose, without a GPU, and hold it to its bound of spilled bytes.

usage: compile_gate.py [--arch sm_90 …] [--kernel flash_fwd …] [--dtype bf16 …] [--variant plain …] [--json FILE] [--bounds]

Needs Triton alone, not torch, so that one venv per Triton version is enough. Ends 1 if a kernel does not compile, spills more
bytes than bench/spills.json allows it (none, if it is not there), or wants more shared memory than its architecture has.
--bounds raises missing bounds to what was found, instead of failing: for a new kernel or a new Triton. Bounds already there
may only fall.
"""

import argparse
import importlib
import json
import math
import sys
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "tfkern" if (HERE.parent / "tfkern").is_dir() else HERE.parent  # in a checkout, or installed

# Shared memory that a program may have, in bytes. Rows of sm_80 also serve sm_86, sm_89 and sm_12x, which have less than it.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}  # bytes; tf32 is float32 inputs under PyTorch's TF32 switch

# Variants by which optional arguments are there (the rest are numbers at run time and change nothing that is compiled), and
# by memory layout: "odd" has a head dim between two classes (10, 20, 40, 80, 160), "strided" a last dim that is not dense.
ALL = {"LEFT", "RIGHT", "KEY_LENGTHS", "DLSE"}
VARIANTS = {"plain": set(), "causal": {"RIGHT"}, "padded": {"KEY_LENGTHS"}, "all": ALL, "odd": ALL, "strided": ALL}
FP32_TENSORS = {"LSE", "DLSE", "DELTA"}
OPTIONAL = {"LEFT": "i32", "RIGHT": "i32", "KEY_LENGTHS": "*i64", "DLSE": "*fp32"}

SPILLS = HERE / "spills.json"


def load(name: str):
    """Import a module of the checkout that needs no torch, past tfkern/__init__.py, which does."""
    if "tfkern" not in sys.modules:
        package = types.ModuleType("tfkern")
        package.__path__ = [str(PACKAGE)]
        kernels = types.ModuleType("tfkern.kernels")
        kernels.__path__ = [str(HERE.parent / "kernels")]
        sys.modules.update({"tfkern": package, "tfkern.kernels": kernels})
    return importlib.import_module(name)


def arguments(kernel, dtype: str, head_dim: int, config, variant: str) -> dict:
    """The kernel's parameters as aot.compile_kernel wants them; head_dim is also the head dim of V."""
    dim = head_dim * 5 // 8 if variant == "odd" else head_dim
    vec = 0 if variant == "strided" else math.gcd(dim, 16)
    constants = dict(
        D=dim, DV=dim, BLOCK_D=head_dim, BLOCK_DV=head_dim, VEC=vec,
        PRECISION="tf32" if dtype == "tf32" else "ieee",
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = ("constexpr", constants[name])
        elif name in OPTIONAL:
            kinds[name] = OPTIONAL[name] if name in VARIANTS[variant] else ("constexpr", None)
        elif name.startswith("stride_"):
            kinds[name] = ("i32",) * 4
        elif name == "scale":
            kinds[name] = "fp32"
        elif name.isupper():
            kinds[name] = "*fp32" if name in FP32_TENSORS or dtype == "tf32" else f"*{dtype}"
        else:
            kinds[name] = "i32"
    return kinds


def jobs(args):
    configs = load("tfkern.configs")
    for arch in args.arch or configs.ARCHITECTURES:
        for kernel in args.kernel or configs.KERNELS:
            for dtype in args.dtype:
                for head_dim in args.head_dim or configs.HEAD_DIM_CLASSES:
                    config = configs.tile_config(arch, kernel, DTYPES[dtype], head_dim)
                    for variant in args.variant:
                        yield arch, kernel, dtype, head_dim, config, variant


def name(row: dict) -> str:
    return " ".join(str(row[key]) for key in ("arch", "kernel", "dtype", "head_dim", "variant"))


def run(arch, kernel, dtype, head_dim, config, variant, bounds: dict[str, int]) -> dict:
    """Compile one and return its row of the table; `problem` is None where all is well."""
    aot = importlib.import_module("aot")
    function = getattr(load("tfkern.kernels.flash_fwd" if kernel == "flash_fwd" else "tfkern.kernels.flash_bwd"), kernel)
    row = dict(arch=arch, kernel=kernel, dtype=dtype, head_dim=head_dim, variant=variant, config=vars(config))
    start = time.perf_counter()
    try:
        compiled = aot.compile_kernel(function, arch, arguments(function, dtype, head_dim, config, variant), config)
        found = aot.resources(compiled, arch)
    except Exception as error:  # whatever the compiler throws is the finding
        return {**row, "problem": f"does not compile: {error!r}"}
    row.update(vars(found), seconds=round(time.perf_counter() - start, 2))
    row["problem"] = problem(row, bounds)
    return row


def problem(row: dict, bounds: dict[str, int]) -> str | None:
    """What is wrong with a kernel that did compile."""
    bound, there = bounds.get(name(row), 0), SHARED[row["arch"]]
    if row["spilled"] > bound:
        return f"spills {row['spilled']} bytes, {bound} allowed"
    if row["shared"] > there:
        return f"needs {row['shared']} bytes of shared memory, {there} there"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+")
    parser.add_argument("--kernel", nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int)
    parser.add_argument("--variant", nargs="+", default=["plain", "causal", "all"], choices=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bounds", action="store_true")
    args = parser.parse_args()
    bounds = json.loads(SPILLS.read_text())
    rows = []
    for job in jobs(args):
        row = run(*job, bounds)
        if args.bounds and row.get("spilled") and name(row) not in bounds:
            bounds[name(row)] = row["spilled"]
            row["problem"] = problem(row, bounds)  # a new bound excuses the spill, nothing else
        rows.append(row)
        c = row["config"]
        tiles = f"{c['block_m']}x{c['block_n']} w{c['num_warps']} s{c['num_stages']}"
        found = (
            f"{row.get('registers', '-'):>4} regs {row.get('spilled', '-'):>5} B spilled {row.get('shared', '-'):>7} B shared"
        )
        where = f"{row['arch']:7} {row['kernel']:15} {row['dtype']} D{row['head_dim']:<4}{row['variant']:7}{tiles:16}"
        print(where, found, f"{row.get('seconds', '-')} s", row["problem"] or "", flush=True)
    if args.bounds:
        SPILLS.write_text(json.dumps(bounds, indent=0, sort_keys=True) + "\n")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    failed = sum(row["problem"] is not None for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
