"""Compile every kernel that tfkern/configs.py can choose, without a GPU, and check its spilled bytes against a bound.

usage: python -m bench.static.compile_gate [--arch sm_90 …] [--kernel flash_fwd …] [--dtype bf16 …] [--variant plain …]
                                            [--json FILE] [--bounds]

--variant features means each feature by itself, and all of them together.

Needs Triton but not torch, so one venv for each version of Triton is enough. The exit status is 1 if a kernel does not compile,
spills more bytes than its bound in bench/static/spills.json (0 if it has none), or needs more shared memory than its
architecture has. --bounds is for a new kernel or a new Triton: instead of failing, it records spills that exceed a bound as
bounds of this version of Triton ("3.8 sm_90 …"). Bounds already recorded may only be lowered. A bound without a version holds
for every Triton.
"""

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path

from tfkern import configs, progress
from tfkern import tiles as table
from tfkern.bench.static import aot
from tfkern.ending import ended
from tfkern.kernels import features as device
from tfkern.kernels import score_mods

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}  # bytes; tf32 is float32 inputs under PyTorch's TF32 switch

# The arguments that each variant has beside queries, keys and values: fields of Features in kernels/features.py, left, right,
# DLSE, or MOD. All others are numbers at run time, and the compiled code does not depend on them. "odd" has a head dim between
# two classes (10, 20, 40, 80, 160), "strided" a last dim that is not dense. "bias" has aligned rows, "bias-any" any strides.
BAND = {"left", "right", "key_lengths", "DLSE"}
VARIANTS = {
    "plain": set(), "causal": {"right"}, "padded": {"key_lengths"}, "all": BAND, "odd": BAND, "strided": BAND,
    "mask": {"mask"}, "bias": {"bias"}, "bias-any": {"bias"}, "dropout": {"dropout"}, "packed": {"cu_q", "cu_k"},
    "softcap": {"softcap"}, "slopes": {"slopes", "right"}, "sinks": {"sinks"}, "score-mod": {"MOD"}, "scale": {"scale"},
    "precise": {"errors"},
    "everything": {*BAND, "bias", "dropout", "softcap", "slopes", "sinks", "MOD", "scale"} - {"key_lengths"} | {"cu_q", "cu_k"},
}  # fmt: skip
HEAVY = {"mask", "bias", "dropout", "softcap", "slopes", "MOD"}
FEATURES = [name for name in VARIANTS if name not in ("plain", "causal", "padded", "all", "odd", "strided")]
FP32_TENSORS = {"STATS", "DLSE", "DELTA", "DSLOPES"}
ONE_PASS_ONLY = {"DLSE", "DQ", "DSLOPES", "stride_dq"}  # arguments of flash_bwd_dkdv that only a backward in one pass has
CUT = {"left", "cu_q", *HEAVY}  # arguments with which backends/portable.py uses no descriptors

SPILLS = Path(__file__).with_name("spills.json")


def features(there: set[str], pointer: str, mask_vec: int):
    """The `Features` of kernels/features.py with types in place of values. there: the arguments of a variant; fields that it
    lacks are None. pointer: the type of the pointer to a bias. mask_vec: the kernel's MASK_VEC."""
    none = aot.Constant(None)
    mask = device.Mask("*u8", ("i32",) * (3 if mask_vec else 4), "i32", "i32")
    kinds = dict(
        key_lengths="*i64", cu_q="*i32", cu_k="*i32", scale="*fp32", softcap="fp32", mask=mask, bias=mask._replace(ptr=pointer),
        slopes=device.Slopes("*fp32", "i32", "i32"), sinks="*fp32", dropout=device.Dropout("*i64", "i32", "fp32"),
    )  # fmt: skip
    return device.Features(*(kinds[name] if name in there else none for name in device.Features._fields))


def function(kernel: str):
    """The device function of a kernel. ONE_PASS and DESCRIBED in tfkern/configs.py are forms of flash_bwd_dkdv."""
    name = "flash_bwd_dkdv" if kernel in (configs.ONE_PASS, configs.DESCRIBED) else kernel
    return getattr(importlib.import_module(f"tfkern.kernels.{name}"), name)


def arguments(kernel_name: str, dtype: str, head_dim: int, config, variant: str) -> dict:
    """The types and constants of a kernel's parameters in a variant, by name, for aot.compile_kernel. The head dim of V is that
    of Q and K: head_dim, or 5/8 of it in the variant "odd"."""
    kernel = function(kernel_name)
    constant = aot.Constant
    there = VARIANTS[variant]
    dim = head_dim * 5 // 8 if variant == "odd" else head_dim
    pointer = "*fp32" if dtype == "tf32" else f"*{dtype}"
    vec = 0 if variant == "strided" else math.gcd(dim, 16)
    mask_vec = 0 if variant == "bias-any" else 8
    constants = dict(
        HEAD_DIM=dim, HEAD_DIM_V=dim, BLOCK_D=head_dim, BLOCK_DV=head_dim, VEC=vec,
        PRECISION="tf32" if dtype == "tf32" else "ieee",
        MOD=score_mods.signed_log if "MOD" in there else None,
        MOD_GRAD=score_mods.signed_log_derivative if "MOD" in there else None,
        LINEAR=not there & {"bias", "softcap", "slopes", "sinks", "MOD"} and kernel.__name__ != "flash_bwd_dbias",
        MASK_VEC=mask_vec, STATS_ROWS=2 + (dim + 1) // 2 if "errors" in there else 2, SUM_ROWS=False, SUM_COLUMNS=False,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = constant(constants[name])
        elif kernel.__name__ == "flash_bwd_dkdv" and kernel_name != configs.ONE_PASS and name in ONE_PASS_ONLY:
            kinds[name] = constant(None)
        elif kernel_name == configs.DESCRIBED and name in ("Q", "DO"):
            kinds[name] = f"tensordesc<{dtype}[1, 1, {config.block_m}, {head_dim}]>"
        elif kernel_name == configs.DESCRIBED and name in ("stride_q", "stride_do"):
            kinds[name] = constant(None)
        elif name == "F":
            extra = {"bias"} if kernel.__name__ == "flash_bwd_dbias" else set()
            kinds[name] = features((there | extra) - ({"mask"} if extra else set()), pointer, mask_vec)
        elif name in ("left", "right"):
            kinds[name] = "i32" if name in there else constant(None)
        elif (name == "DLSE" and name not in there) or (name == "DSLOPES" and "slopes" not in there):
            kinds[name] = constant(None)
        elif name.startswith("stride_"):
            kinds[name] = ("i32",) * (3 if vec else 4)
        elif name == "scale":
            kinds[name] = "fp32"
        elif name.isupper():
            kinds[name] = "*fp32" if name in FP32_TENSORS else pointer
        else:
            kinds[name] = "i32"
    return kinds


def jobs(args):
    for arch in args.arch or table.ARCHITECTURES:
        for kernel in args.kernel or (*table.KERNELS, configs.ONE_PASS, configs.DESCRIBED):
            for dtype in args.dtype:
                for head_dim in args.head_dim or table.HEAD_DIM_CLASSES:
                    for variant in args.variant:
                        for config in tiles(kernel, arch, DTYPES[dtype], head_dim, variant):
                            yield arch, kernel, dtype, head_dim, config, variant


def tiles(kernel: str, arch: str, size: int, head_dim: int, variant: str) -> list:
    """The tiles that tfkern/configs.py has for a kernel in a variant: any number for a backward in one pass, at most one with
    descriptors, one for all other kernels. size: the bytes of an element."""
    there = VARIANTS[variant]
    heavy = bool(HEAVY & there) or variant == "strided"
    if kernel == configs.DESCRIBED:
        config = configs.described(arch, size, head_dim)
        return [] if config is None or variant == "strided" or there & CUT else [config]
    if kernel != configs.ONE_PASS:
        return [configs.tile_config(arch, kernel, size, head_dim, heavy)]
    if heavy or "cu_q" in there:  # the portable backend then takes two launches
        return []
    return configs.one_pass_tiles(arch, size, head_dim)


def name(row: dict) -> str:
    block = f" {row['config']['block_n']} keys" if "one_pass" in row["kernel"] else ""
    return " ".join(str(row[key]) for key in ("arch", "kernel", "dtype", "head_dim", "variant")) + block


def own_name(row: dict) -> str:
    """The name of a row in spills.json for a bound of this version of Triton alone."""
    return f"{'.'.join(aot.triton.__version__.split('.')[:2])} {name(row)}"


def run(arch, kernel, dtype, head_dim, config, variant, bounds: dict[str, int]) -> dict:
    """Compile a kernel and return its row of the results. bounds: the contents of spills.json. The row's `problem` is a text,
    or None if nothing is wrong."""
    row = dict(arch=arch, kernel=kernel, dtype=dtype, head_dim=head_dim, variant=variant, config=vars(config))
    start = time.perf_counter()
    try:
        compiled = aot.compile_kernel(function(kernel), arch, arguments(kernel, dtype, head_dim, config, variant), config)
        found = aot.resources(compiled, arch)
    except Exception as error:  # any error of the compiler is a result
        return {**row, "problem": f"does not compile: {error!r}"}
    row.update(vars(found), across=aot.reduces_across_warps(compiled), seconds=round(time.perf_counter() - start, 2))
    row["problem"] = problem(row, bounds)
    return row


def problem(row: dict, bounds: dict[str, int]) -> str | None:
    """The problem of a kernel that did compile, as text: it exceeds its bound of spilled bytes or the shared memory of its
    architecture. None if it does neither."""
    bound, there = bounds.get(own_name(row), bounds.get(name(row), 0)), table.SHARED[row["arch"]]
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
    parser.add_argument("--variant", nargs="+", default=["plain", "causal", "all"], choices=[*VARIANTS, "features"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bounds", action="store_true")
    args = parser.parse_args()
    args.variant = [v for name in args.variant for v in (FEATURES if name == "features" else [name])]
    bounds = json.loads(SPILLS.read_text())
    rows = []
    for job in progress.counted(jobs(args), lambda job: " ".join(map(str, (*job[:4], job[5])))):
        row = run(*job, bounds)
        if args.bounds and row.get("spilled", 0) > bounds.get(name(row), 0) and own_name(row) not in bounds:
            bounds[own_name(row)] = row["spilled"]
            row["problem"] = problem(row, bounds)  # a new bound excuses the spill, nothing else
        rows.append(row)
        c = row["config"]
        tiles = f"{c['block_m']}x{c['block_n']} w{c['num_warps']} s{c['num_stages']}"
        instructions, registers, spilled, shared = (
            row.get(key, "-") for key in ("instructions", "registers", "spilled", "shared")
        )
        found = f"{instructions:>5} lines {registers:>4} regs {spilled:>5} B spilled {shared:>7} B shared"
        where = f"{row['arch']:7} {row['kernel']:15} {row['dtype']} D{row['head_dim']:<4}{row['variant']:11}{tiles:16}"
        print(where, found, f"{row.get('seconds', '-')} s", row["problem"] or "", flush=True)
    if args.bounds:
        SPILLS.write_text(json.dumps(bounds, indent=0, sort_keys=True) + "\n")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    failed = sum(row["problem"] is not None for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
