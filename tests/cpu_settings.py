"""The tests that compare numbers, on a CPU held to other instructions or given another number of threads.

usage: python tests/cpu_settings.py [--setting N | --all] [pytest's arguments …]

PyTorch's own results depend on both, and so do the errors of plain PyTorch beside which ours are judged. Without --setting
the day chooses, so that runs on different days try different ones.
"""

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# What compares results of PyTorch's arithmetic; the simulator, the compiler and the command line don't depend on it.
FILES = [
    "test_attention.py", "test_budget.py", "test_dropout.py", "test_extremes.py", "test_features.py", "test_flash_attn_names.py",
    "test_mha.py", "test_models.py", "test_nanogpt.py", "test_packed.py", "test_patch.py", "test_sdpa.py",
    "test_sdpa_flash_hook.py", "test_small.py", "test_timm.py", "test_transformers.py",
    "test_transformers_function.py", "test_transformers_masks.py",
]  # fmt: skip
# Of ATen's own kernels, oneDNN and MKL, from the narrowest instructions to the CPU's best.
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
INSTRUCTIONS = [("default", "SSE41", "SSE4_2"), ("avx2", "AVX2", "AVX2"), ()]
SETTINGS = [
    dict(zip(VARIABLES, values, strict=False)) | dict(TFKERN_TEST_THREADS=str(threads))
    for threads in (1, 2, 3) for values in INSTRUCTIONS if values or threads > 1  # else it is what `make test` has
]  # fmt: skip


def main() -> int:
    """pytest's exit status, the largest of all settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)))
    parser.add_argument("--all", action="store_true")
    args, arguments = parser.parse_known_args()
    if args.all:
        command = [sys.executable, __file__, *arguments, "--setting"]
        return max(subprocess.run([*command, str(number)], check=False).returncode for number in range(len(SETTINGS)))
    number = datetime.date.today().toordinal() % len(SETTINGS) if args.setting is None else args.setting
    os.environ.update(SETTINGS[number])
    import pytest
    import torch  # reads the environment once

    given = " ".join(f"{name}={value}" for name, value in SETTINGS[number].items())
    print(f"setting {number}: {given}; ATen computes with {torch.backends.cpu.get_cpu_capability()}", flush=True)

    return pytest.main(["-q", *(arguments or ["-m", "not slow"]), *(str(TESTS / name) for name in FILES)])


if __name__ == "__main__":
    sys.exit(main())
