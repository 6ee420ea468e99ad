"""Time tfkern beside PyTorch's attention, FlexAttention and the naive formula; each is verified before it is timed.

On a GPU: medians by CUDA events at the sizes of ViT, BERT and GPT. Without one the Triton kernels can't be timed; then this
compares the CPU backend, and --compile prints what the compiler makes of every kernel for GPUs that are not here.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tfkern.extras import require

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser) -> None:
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 without")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    parser.add_argument("--out", type=Path, default=Path("tfkern-out/bench"), help="folder of results.json and results.png")
    parser.add_argument("--compile", action="store_true", help="print registers, spills and shared memory of every kernel")


def run(args) -> int:
    """0, or 1 if something timed here was wrong or a kernel is beyond its bounds."""
    if args.compile:
        return compile_table()
    require("matplotlib", "demo")
    from tfkern.bench import plots, runner

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU: the Triton kernels can't be timed here. This compares the CPU backend; --compile shows the kernels.\n")
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    rows = []
    for row in runner.run(dtype, device, args.seconds):
        rows.append(row)
        where = f"{row['shape']:15} {row.get('direction', ''):17} {row['provider']:16}"
        print(where, row.get("skipped") or f"{row['ms']:9.3f} ms  {row['tflops']:8.3f} TFLOP/s", flush=True)
    runner.save(args.out / "results.json", rows)
    plots.draw(args.out / "results.json", args.out / "results.png")
    print(f"wrote {args.out / 'results.json'} and {args.out / 'results.png'}")
    return 1 if any("wrong results" in row.get("skipped", "") for row in rows) else 0


def compile_table() -> int:
    """The compile gate in a process of its own: here kernels may be bound to the interpreter already."""
    import tfkern.bench

    gate = Path(tfkern.bench.__file__).with_name("compile_gate.py")
    return subprocess.run([sys.executable, gate], env={**os.environ, "TRITON_INTERPRET": "0"}, check=False).returncode
