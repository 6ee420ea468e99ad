#!/usr/bin/env python3
"""The compile gate of the Gluon kernels: for sm_90, without a GPU, they spill nothing and overlap what they are meant to.

usage: hopper_gate.py [--spills BYTES] [--kernel …] [--dtype …] [--band …]

Compiles every configuration of tfkern/tiles.py, forward and backward, without a band, causal and with a window, and checks: at
most --spills bytes spilled a thread; ptxas serialises no wgmma (its advisories C7510 to C7515); every exponential in a loop has
a wgmma in flight; no instruction writes a register from which a wgmma in flight reads. Needs Triton alone.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import aot
import compile_gate
import machine_code
import sass
import sweep
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

BANDS = {"full": (None, None), "causal": (None, "i32"), "window": ("i32", "i32"), "padded": (None, None)}  # padded: key lengths
ROWS = 64  # that a consumer owns
STREAMED = {"flash_fwd": "kv", "flash_bwd_dq": "kv", "flash_bwd_dkdv": ("q", "do")}  # what comes past, in other tiles

# Bytes, beyond --spills, of (kernel, head dim): one register of each consumer, on the way into and out of the loops.
SPILLED = {("flash_bwd_dkdv", 128): 8}


def descriptor(dtype: str, rows: int, dim: int) -> str:
    """The type of a TMA descriptor, as GluonASTSource wants it."""
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], gl.bfloat16)
    return f"tensordesc<{dtype}[1, 1, {rows}, {dim}],{layout!r}>"


def configurations(kernels: list[str]):
    """(kernel, head dim, config) of all that tfkern/tiles.py has for them."""
    tiles = compile_gate.load("tfkern.tiles")
    tables = {"flash_fwd": tiles.HOPPER, **tiles.HOPPER_BACKWARD}
    return [(name, dim, config) for name in kernels for dim, configs in tables[name].items() for config in configs]


def source(name: str, dtype: str, dim: int, config, band: str):
    """A kernel with its arguments as types."""
    kernel = getattr(compile_gate.load(f"tfkern.kernels.hopper.{name}"), name)
    features = compile_gate.load("tfkern.kernels.features")
    lengths = {"key_lengths": "*i64"} if band == "padded" else {}
    owned, streamed = ("N", "M") if name == "flash_bwd_dkdv" else ("M", "N")
    constants = {
        f"BLOCK_{owned}": ROWS, f"BLOCK_{streamed}": config.block_n, "D": dim, "STAGES": config.stages,
        "CONSUMERS": config.consumers, "PINGPONG": config.pingpong, "REGISTERS": config.registers,
    }  # fmt: skip
    kinds = dict(LSE="*fp32", DLSE="*fp32" if lengths else None, DELTA="*fp32", scale="fp32")
    kinds |= dict(zip(("LEFT", "RIGHT"), BANDS[band], strict=True))
    signature, values, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.arg_names):
        kind = kinds.get(parameter, "i32")
        if parameter == "F":
            signature[parameter] = features.Features(*(lengths.get(field, "constexpr") for field in features.NONE._fields))
            values |= {(i, j): None for j, field in enumerate(features.NONE._fields) if field not in lengths}
        elif parameter in constants or kind is None:
            signature[parameter], values[(i,)] = "constexpr", constants.get(parameter)
        elif parameter.endswith("_desc"):
            rows = config.block_n if parameter.removesuffix("_desc") in STREAMED[name] else ROWS
            signature[parameter] = descriptor(dtype, rows, dim)
        else:
            signature[parameter] = kind
            aligned |= {(i,): [["tt.divisibility", 16]]} if kind.startswith("*") else {}
    return GluonASTSource(kernel, signature, values, aligned)


def advisories(ptx: str) -> list[str]:
    """What ptxas says of wgmma that it had to serialise."""
    ptxas = get_ptxas(90).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [ptxas, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
    return [line for line in (done.stdout + done.stderr).splitlines() if "C75" in line]


def judge(binary, spills: int) -> tuple[str, list[str]]:
    """(what was found, what is wrong)."""
    found = aot.resources(binary, "sm_90")
    loops = machine_code.loops(sweep.code_of(binary, "sm_90"), sass.MULTIPLY)
    exponentials = sum(x.opcode == "MUFU.EX2" for body in loops for x in body)
    exposed = sum(sass.exposed(body) for body in loops)
    wrong = [f"spills {found.spilled} bytes, {spills} allowed"] if found.spilled > spills else []
    wrong += advisories(binary.asm["ptx"])
    wrong += [f"{exposed} of {exponentials} exponentials wait for nothing"] if exposed or not exponentials else []
    wrong += [f"{x} overwrites an operand" for body in loops for x in sass.clobbered(body)]
    if found.shared > compile_gate.SHARED["sm_90"]:
        wrong.append("needs more shared memory than there is")
    hidden = f"{exponentials - exposed} of {exponentials} exp2 under a wgmma"
    return f"{found.registers} regs {found.spilled:4} B spilled {found.shared:7} B shared {hidden}", wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spills", type=int, default=0, help="bytes a thread")
    parser.add_argument("--kernel", nargs="+", choices=STREAMED, default=list(STREAMED))
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16"), default=["bf16", "fp16"])
    parser.add_argument("--band", nargs="+", choices=BANDS, default=list(BANDS))
    args = parser.parse_args()
    failed = 0
    print(f"Triton {aot.triton.__version__}")
    for (kernel, dim, config), dtype, band in itertools.product(configurations(args.kernel), args.dtype, args.band):
        binary = aot.triton.compile(
            source(kernel, dtype, dim, config, band),
            target=aot.TARGETS["sm_90"],
            options=dict(num_warps=4, enable_fp_fusion=True),
        )
        text, wrong = judge(binary, args.spills + SPILLED.get((kernel, dim), 0))
        failed += bool(wrong)
        tiles = f"{config.consumers} x {ROWS} x {config.block_n} s{config.stages}"
        print(f"{kernel:14} {dtype} D{dim:<4} {band:7} {tiles:17} {text} {'; '.join(wrong)}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
