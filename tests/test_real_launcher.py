"""Triton's own launcher in C, over a CUDA driver that only listens (bench/stub_gpu.py): our launches hand it what the JIT's do,
and what the kernels' parameters ask for. PYTHONPATH may put another Triton before the installed one."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tfkern import compat_triton, launch, tma
from tfkern.bench import stub_gpu
from tfkern.tiles import HOPPER_ONE_PASS_SPILLS

SCRIPT = Path(__file__).with_name("real_launcher.py")
KERNELS = {
    "portable-plain": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "portable-one-pass": ["flash_fwd", "flash_bwd_dkdv"],
    "portable-features": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv", "flash_bwd_dbias"],
    "portable-unaligned": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "portable-varlen": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "hopper-plain": ["flash_fwd", "flash_fwd", "flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],  # of few heads
    "hopper-short": ["flash_fwd_short", "flash_bwd"],
    "hopper-one-query": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "hopper-features": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
    "hopper-varlen": ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"],
}
QUICK = [
    "portable-plain",
    "portable-features",
    "portable-one-pass",
    "hopper-plain",
    "hopper-short",
    "hopper-features",
]  # every kernel, and features
slow = pytest.mark.slow
pytestmark = pytest.mark.needs("a C compiler for Triton's launcher", stub_gpu.compiler() is not None)


@pytest.fixture(scope="module")
def launches():
    """What the script found, by problem."""
    kept = {}

    def of(name: str) -> dict:
        if name not in kept:
            names = QUICK if name in QUICK else [name]
            environment = {**os.environ, "TRITON_INTERPRET": "0"}
            command = [sys.executable, "-I", str(SCRIPT), ",".join(names)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            found = json.loads(done.stdout.splitlines()[-1])
            assert found["triton"] == importlib.metadata.version("triton")  # PYTHONPATH's
            kept.update(found["problems"])
        return kept[name]

    return of


ALL = pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=slow) for x in KERNELS])
DESCRIBED = ["portable-plain", *(x for x in KERNELS if "hopper" in x)]
BY_TMA = pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=slow) for x in DESCRIBED])


@ALL
def test_the_driver_gets_what_the_jit_hands_it(launches, name):
    names = KERNELS[name]
    if launch.triton_version() >= HOPPER_ONE_PASS_SPILLS:  # no backward in one launch there
        names = [part for x in names for part in (["flash_bwd_dq", "flash_bwd_dkdv"] if x == "flash_bwd" else [x])]
    rows = launches(name)["launches"]
    assert [row["kernel"] for row in rows] == names
    for row in rows:
        assert row["launches"] == [1, 1]
        assert [key for key, same in row["same"].items() if not same] == []
        assert row["expected"], "parameters in the kernel's order, and nothing else"
        assert not row["attributes"]
        for found, wanted in (row["grid"], row["block"], row["shared"]):
            assert found == wanted


@ALL
def test_nothing_is_made_twice_or_kept_alive(launches, name):
    """Of tensors that lie where others lay, a launch takes no JIT, no descriptor and no tensor map, and it keeps no tensor."""
    for row in launches(name)["launches"]:
        assert row["again"] == dict(jitted=0, descriptors=0, encodings=0)
    assert launches(name)["alive"] == 0


@BY_TMA
def test_tensor_maps_are_ones_that_the_driver_takes(launches, name):
    """CUDA's rules for 16-bit types: strides in multiples of 16 bytes below 2**40, boxes of at most 256 a dim, rows of a
    swizzled one within 128 bytes."""
    by_tma = [row for row in launches(name)["launches"] if "hopper" in name or row["kernel"] == "flash_bwd_dkdv"]
    assert by_tma
    for row in by_tma:
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


def test_encoded_descriptors_are_bounded(monkeypatch):
    monkeypatch.setattr(compat_triton, "encode", lambda described, metadata: (described, metadata))
    maps = tma.Maps("metadata")
    for n in range(3 * tma.KEPT):
        assert maps.add(n, str(n)) == (str(n), "metadata")
        assert 0 < len(maps) <= tma.KEPT


@slow
def test_hopper_costs_at_most_a_third_more_than_portable():
    """Of a thread's own time, which others' work on the machine hardly touches, the best of many rounds."""
    script = """
import time, torch, tfkern
from tfkern.bench import overhead, stub_gpu
stub_gpu.Stub()
torch.set_num_threads(1)
q, k, v = leaves = [torch.zeros(2, 3, 16, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
def calls(backend):
    f = lambda: tfkern.attention(*leaves, backend=backend)
    do = torch.zeros_like(f())
    return [torch.no_grad()(f), lambda: torch.autograd.grad(f(), leaves, do)]
print(overhead.microseconds(calls("portable") + calls("hopper"), clock=time.thread_time))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    forward, both, hopper_forward, hopper_both = json.loads(done.stdout)
    assert hopper_forward <= 1.3 * forward
    assert hopper_both <= 1.3 * both
