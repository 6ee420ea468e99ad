#!/usr/bin/env python3
"""The compile gate of the Gluon kernels: for sm_90, without a GPU, they spill nothing and overlap what they are meant to.

usage: hopper_gate.py [--spills BYTES]

Compiles every configuration of tfkern/tiles.py without a band, causal and with a window, and checks: at most --spills bytes
spilled a thread; ptxas serialises no wgmma (its advisories C7510 to C7515); every exponential in a loop has a wgmma in flight;
no instruction writes a register from which a wgmma in flight reads. Needs Triton alone.
"""

import argparse
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


def descriptor(dtype: str, rows: int, dim: int) -> str:
    """The type of a TMA descriptor, as GluonASTSource wants it."""
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], gl.bfloat16)
    return f"tensordesc<{dtype}[1, 1, {rows}, {dim}],{layout!r}>"


def source(dtype: str, dim: int, config, variant: str):
    """flash_fwd with its arguments as types."""
    band = BANDS[variant]
    kernel = compile_gate.load("tfkern.kernels.hopper.flash_fwd").flash_fwd
    features = compile_gate.load("tfkern.kernels.features")
    constants = config.constants(dim)
    kinds = dict.fromkeys(("q_desc", "o_desc"), descriptor(dtype, constants["BLOCK_M"], dim))
    kinds |= dict.fromkeys(("k_desc", "v_desc"), descriptor(dtype, config.block_n, dim)) | dict(LSE="*fp32", scale="fp32")
    kinds |= {name: kind for name, kind in zip(("LEFT", "RIGHT"), band, strict=True) if kind}
    constants |= {name: None for name, kind in zip(("LEFT", "RIGHT"), band, strict=True) if not kind}
    signature, values = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name == "F":
            lengths = {"key_lengths": "*i64"} if variant == "padded" else {}
            signature[name] = features.Features(*(lengths.get(field, "constexpr") for field in features.NONE._fields))
            values |= {(i, j): None for j, field in enumerate(features.NONE._fields) if field not in lengths}
        elif name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = kinds.get(name, "i32")
    return GluonASTSource(kernel, signature, values, {(kernel.arg_names.index("LSE"),): [["tt.divisibility", 16]]})


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
    args = parser.parse_args()
    failed = 0
    print(f"Triton {aot.triton.__version__}")
    for dim, configs in compile_gate.load("tfkern.tiles").HOPPER.items():
        for config in configs:
            for dtype in ("bf16", "fp16"):
                for name in BANDS:
                    compiled = source(dtype, dim, config, name)
                    binary = aot.triton.compile(
                        compiled, target=aot.TARGETS["sm_90"], options=dict(num_warps=4, enable_fp_fusion=True)
                    )
                    text, wrong = judge(binary, args.spills)
                    failed += bool(wrong)
                    tiles = f"{config.consumers} consumers x {config.block_n} s{config.stages}"
                    print(f"flash_fwd {dtype} D{dim:<4} {name:7} {tiles:20} {text} {'; '.join(wrong)}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
