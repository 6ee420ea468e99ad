"""Compile the Gluon kernels for sm_90 without a GPU, and check their spills and that wgmma hides the exponentials.

usage: python -m bench.static.hopper_gate [--kernel flash_fwd …] [--head-dim 64 …] [--dtype bf16 …] [--variant full …]
                                           [--json FILE]

Compiles every configuration of tfkern/tiles.py and checks:
- The loops over tiles spill nothing, and a kernel spills at most SPILLED bytes a thread, unless RECORDED allows more.
- ptxas serialises no wgmma (it reports that in its advisories C7510 to C7515).
- The loops contain exponentials, and each is issued while a wgmma is in flight.
- No instruction writes a register from which a wgmma in flight reads.
- A program needs no more shared memory than sm_90 has.
Needs Triton only, not torch.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from triton.experimental.gluon import language as gl

from tfkern import compat_triton, tiles
from tfkern.bench.static import aot, compile_gate, machine_code, sass, sweep
from tfkern.ending import ended
from tfkern.kernels import score_mods

# The arguments that each variant has beside queries, keys and values, as in compile_gate.py.
VARIANTS = {
    "full": set(), "causal": {"right"}, "window": {"left", "right"}, "padded": {"key_lengths"}, "packed": {"cu_q", "cu_k"},
    "mask": {"mask"}, "bias": {"bias"}, "bias-any": {"bias"}, "dropout": {"dropout"}, "softcap": {"softcap"},
    "slopes": {"slopes", "right"}, "sinks": {"sinks"}, "score-mod": {"MOD"},
    "several": {"left", "right", "cu_q", "cu_k", "dropout", "softcap", "slopes", "sinks", "MOD"},
    "everything": {"left", "right", "cu_q", "cu_k", "bias", "dropout", "softcap", "slopes", "sinks", "MOD"},
}  # fmt: skip
KERNELS = ["flash_fwd", "flash_fwd_short", "flash_bwd_dq", "flash_bwd_dkdv", "flash_bwd"]
# The variants that the two backward kernels have.
BACKWARD = [name for name, there in VARIANTS.items() if name != "several" and not there & {"mask", "bias"}]
SHORT = ["full", "causal", "padded", "softcap", "slopes", "sinks", "score-mod"]  # for which flash_fwd_short is chosen
ONE_PASS = ["full", "causal", "window", "padded"]  # the variants that flash_bwd has
SPILLED = 64  # bytes a thread: such as the program's number, which ptxas spills where a partition starts
# The spills allowed to Triton versions newer than the pinned one, by (version, kernel, head dim, variant): (bytes a thread,
# spill instructions in loops). A figure may be lowered, never raised.
RECORDED = {
    ("3.9", "flash_fwd", 64, "packed"): (SPILLED, 8), ("3.9", "flash_fwd", 128, "full"): (SPILLED, 8),
    ("3.9", "flash_fwd", 128, "padded"): (SPILLED, 10), ("3.9", "flash_fwd", 128, "packed"): (120, 12),
    ("3.9", "flash_fwd", 128, "several"): (SPILLED, 6), ("3.9", "flash_fwd", 256, "causal"): (72, 0),
    ("3.9", "flash_fwd", 256, "window"): (80, 5), ("3.9", "flash_fwd", 256, "packed"): (152, 0),
    ("3.9", "flash_fwd", 256, "dropout"): (128, 59), ("3.9", "flash_bwd_dkdv", 128, "causal"): (SPILLED, 12),
    ("3.9", "flash_bwd_dkdv", 128, "window"): (SPILLED, 12), ("3.9", "flash_bwd_dkdv", 128, "full"): (80, 0),
    ("3.8", "flash_bwd_dkdv", 128, "causal"): (SPILLED, 4),
}  # fmt: skip


def descriptor(dtype: str, rows: int, dim: int) -> str:
    """The type of a TMA descriptor of rows x dim tiles, in the notation of GluonASTSource."""
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], gl.bfloat16)
    return f"tensordesc<{dtype}[1, 1, {rows}, {dim}],{layout!r}>"


def source(name: str, dtype: str, dim: int, config, variant: str):
    """A kernel of kernels/hopper and the types of its arguments in a variant, ready for triton.compile."""
    there = VARIANTS[variant]
    kernel = getattr(importlib.import_module(f"tfkern.kernels.hopper.{name}"), name)
    mask_vec = 0 if variant == "bias-any" else 8
    linear = not there & {"bias", "softcap", "slopes", "sinks", "MOD"}
    constants = dict(MOD=None, MOD_GRAD=None, DLSE=None, DSLOPES=None, LINEAR=linear, MASK_VEC=mask_vec, HEAD_DIM=dim)
    constants |= config.constants(dim, owns_keys=True) if name == "flash_bwd_dkdv" else config.constants(dim)
    constants |= {side: None for side in ("left", "right") if side not in there}
    if "MOD" in there:
        constants |= dict(MOD=score_mods.signed_log, MOD_GRAD=score_mods.signed_log_derivative)
    for argument, feature in (("DLSE", "key_lengths"), ("DSLOPES", "slopes")):
        if feature in there:
            del constants[argument]
    rows = {"k": constants["BLOCK_N"], "v": constants["BLOCK_N"], "dk": constants["BLOCK_N"], "dv": constants["BLOCK_N"]}
    kinds = dict.fromkeys(("O", "DQ", "DK", "DV"), f"*{dtype}") | dict.fromkeys(("STATS", "DLSE", "DELTA", "DSLOPES"), "*fp32")
    kinds |= dict.fromkeys(("stride_o", "stride_dq", "stride_dk", "stride_dv"), ("i32",) * 3)
    kinds |= dict(F=compile_gate.features(there, f"*{dtype}", mask_vec), scale="fp32")
    for parameter in kernel.arg_names:
        if parameter.endswith("_desc"):
            kinds[parameter] = descriptor(dtype, rows.get(parameter.removesuffix("_desc"), constants["BLOCK_M"]), dim)
    given = {name: aot.Constant(constants[name]) if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    return aot.source(kernel, given, gluon=True)


def advisories(ptx: str) -> list[str]:
    """The advisories (C75xx) of ptxas on wgmma instructions that it had to serialise."""
    ptxas = compat_triton.ptxas(90)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [ptxas, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
    return [line for line in (done.stdout + done.stderr).splitlines() if "C75" in line]


def judge(binary, spilled: int = SPILLED, in_loops: int = 0) -> tuple[str, list[str]]:
    """Return (the figures found in one line, a list of problems) for a compiled kernel.
    spilled: the bytes a thread that it may spill. in_loops: the spill stores and loads (STL, LDL) that its loops over tiles
    may have."""
    found = aot.resources(binary, "sm_90")
    loops = machine_code.loops(sweep.code_of(binary, "sm_90"), sass.MULTIPLY)
    exponentials = sum(x.opcode == "MUFU.EX2" for body in loops for x in body)
    exposed = sum(sass.exposed(body) for body in loops)
    wrong = [f"spills {found.spilled} bytes, {spilled} allowed"] if found.spilled > spilled else []
    spills = sum(x.name in ("LDL", "STL") for body in loops for x in body)
    wrong += [f"{spills} spills in loops, {in_loops} allowed"] if spills > in_loops else []
    wrong += advisories(binary.asm["ptx"])
    wrong += [f"{exposed} of {exponentials} exponentials wait for nothing"] if exposed or not exponentials else []
    wrong += [f"{x} overwrites an operand" for body in loops for x in sass.clobbered(body)]
    if found.shared > tiles.SHARED["sm_90"]:
        wrong.append("needs more shared memory than there is")
    hidden = f"{exponentials - exposed} of {exponentials} exp2 under a wgmma"
    return f"{found.registers} regs {found.spilled:4} B spilled {found.shared:7} B shared {hidden}", wrong


def configurations(kernel: str, dim: int, variant: str) -> list:
    """The configurations of tfkern/tiles.py for a kernel, a head dim and a variant. Empty if the kernel lacks the variant."""
    heavy = compile_gate.HEAVY & VARIANTS[variant]
    if kernel == "flash_bwd":
        return list(tiles.HOPPER_ONE_PASS.get(dim, ())) if variant in ONE_PASS else []
    if kernel.startswith("flash_bwd"):
        found = tiles.HOPPER_BACKWARD[kernel].get(dim)
        return ([found.heavy] if heavy else [found.usual, found.single]) if found and variant in BACKWARD else []
    found = tiles.HOPPER[dim]
    if kernel == "flash_fwd_short":
        return [found.short] if found.short and variant in SHORT else []
    if {"mask", "bias"} & VARIANTS[variant]:
        return [found.masked] if found.masked else []
    if variant == "several" and dim > 128:  # the backend declines it
        return []
    fitting = found.heavy[:1] if variant == "several" else found.heavy if heavy else found.usual
    return list(dict.fromkeys([*fitting, found.single]))


def jobs(args):
    for kernel in args.kernel:
        spills = tiles.HOPPER_ONE_PASS_SPILLS
        if kernel == "flash_bwd" and tuple(map(int, aot.triton.__version__.split(".")[:2])) >= spills:
            print(f"{kernel}: not taken with Triton {spills[0]}.{spills[1]} and newer, which spill in its loops")
            continue
        for dim in args.head_dim:
            for variant in args.variant:
                for config in configurations(kernel, dim, variant):
                    for dtype in args.dtype:
                        yield kernel, dtype, dim, config, variant


def run(kernel: str, dtype: str, dim: int, config, variant: str) -> tuple[dict, str]:
    """Compile one configuration. Return (its row of the table, the row as a line of text). In the row `problem` is None if
    nothing is wrong."""
    compiled = source(kernel, dtype, dim, config, variant)
    binary = aot.triton.compile(compiled, target=aot.TARGETS["sm_90"], options=config.options())
    version = ".".join(aot.triton.__version__.split(".")[:2])
    text, wrong = judge(binary, *RECORDED.get((version, kernel, dim, variant), ()))
    tiles = f"{config.consumers} consumers x {config.block_n} s{config.stages}"
    tiles += f" {config.tiles} slots" if kernel == "flash_bwd" else ""
    row = dict(kernel=kernel, dtype=dtype, head_dim=dim, variant=variant, tiles=tiles, problem="; ".join(wrong) or None)
    words = f"{kernel:14} {dtype} D{dim:<4} {variant:10} {tiles:28} {text} {row['problem'] or ''}"
    return row | vars(aot.resources(binary, "sm_90")), words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtype", nargs="+", default=["bf16"])
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"Triton {aot.triton.__version__}")
    rows = []
    for job in jobs(args):
        row, words = run(*job)
        rows.append(row)
        print(words, flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    failed = sum(row["problem"] is not None for row in rows)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
