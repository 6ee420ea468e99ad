"""Triton's own launcher in C, over a CUDA driver that only listens (bench/stub_gpu.py): our launches hand it what the JIT's do,
and what the kernels' parameters ask for. PYTHONPATH may put another Triton before the installed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tfkern import launch
from tfkern.bench import stub_gpu

SCRIPT = Path(__file__).with_name("real_launcher.py")
KERNELS = {
    "portable-plain": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "portable-one-pass": ["flash_fwd", "flash_bwd_dkdv"],
    "portable-features": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv", "flash_bwd_dbias"],
    "portable-unaligned": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "portable-varlen": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "hopper-plain": ["flash_fwd", "flash_bwd"],
    "hopper-short": ["flash_fwd_short", "flash_bwd"],
    "hopper-one-query": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "hopper-features": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "hopper-varlen": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
}
QUICK = [
    "portable-features",
    "portable-one-pass",
    "hopper-plain",
    "hopper-short",
    "hopper-features",
]  # every kernel, and features
slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(stub_gpu.compiler() is None, reason="Triton's launcher needs a C compiler; none is here")


@pytest.fixture(scope="module")
def launches():
    """What the script found, by problem."""
    kept = {}

    def of(name: str) -> list[dict]:
        if name not in kept:
            names = QUICK if name in QUICK else [name]
            environment = {**os.environ, "TRITON_INTERPRET": "0"}
            command = [sys.executable, "-I", str(SCRIPT), ",".join(names)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            kept.update(json.loads(done.stdout.splitlines()[-1]))
        return kept[name]

    return of


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=slow) for x in KERNELS])
def test_the_driver_gets_what_the_jit_hands_it(launches, name):
    names = KERNELS[name]
    if launch.triton_version() >= (3, 8):  # no backward in one launch there: tiles.HOPPER_ONE_PASS_SPILLS
        names = [part for x in names for part in (["flash_bwd_dq", "flash_bwd_dkdv"] if x == "flash_bwd" else [x])]
    assert [row["kernel"] for row in launches(name)] == names
    for row in launches(name):
        assert row["launches"] == [1, 1]
        assert row["jitted"] == 0
        assert row["encoded_again"] == 0, "a tensor that lies where it lay has its tensor map"
        assert [key for key, same in row["same"].items() if not same] == []
        assert row["expected"], "parameters in the kernel's order, and nothing else"
        assert not row["attributes"]
        for found, wanted in (row["grid"], row["block"], row["shared"]):
            assert found == wanted


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=slow) for x in KERNELS if "hopper" in x])
def test_tensor_maps_are_ones_that_the_driver_takes(launches, name):
    """CUDA's rules for 16-bit types: strides in multiples of 16 bytes below 2**40, boxes of at most 256 a dim, rows of a
    swizzled one within 128 bytes."""
    for row in launches(name):
        assert row["maps"]
        for found in row["maps"]:
            assert found["base"]
            assert found["sizes"]
            assert found["true_strides"]
            assert all(s % 16 == 0 and 0 < s < 2**40 for s in found["strides"])
            dim, rows, *others = found["wanted_box"]
            assert found["box"] == [min(dim, 64), rows, *others]
            assert max(found["box"]) <= 256
            assert found["steps"] == [1, 1, 1, 1]
