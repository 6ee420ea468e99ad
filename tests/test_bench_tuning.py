"""What is compiled before it is needed, and which tiles are timed: on a GPU that is not there, and in the interpreter."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch

from tfkern import configs, launch, tiles
from tfkern.bench import launches, timing, verify
from tfkern.bench.gpu import tuning
from tfkern.bench.shapes import Shape
from tfkern.bench.static import candidates

ONE_LAUNCH = launch.triton_version() < tiles.HOPPER_ONE_PASS_SPILLS  # newer ones take two on an H100, always


def on_no_gpu(script: str, **environment) -> list[str]:
    """The lines that a script prints in a process that compiles for a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_what_is_timed_reaches_every_kernel():
    """With the tiles that an H100 takes; and what is prewarmed are all kernels that are timed, each once."""
    names = on_no_gpu("""
from tfkern.bench import shapes
from tfkern.bench.gpu import prewarm
print(*dict(prewarm.cases(prewarm.attention(s, b) for b in ("portable", "hopper") for s in shapes.GPU_SHAPES)), sep="\\n")
""")
    kernels = {name.split()[0] for name in names}
    assert kernels == {"flash_fwd", "flash_fwd_short", "flash_bwd_dq", "flash_bwd_dkdv", *["flash_bwd"] * ONE_LAUNCH}
    assert len(names) == len(set(names))
    one = {name.split(" #")[0] for name in names if "flash_bwd " in name}
    assert one == {f"flash_bwd {c.tiles},{c.ring}" for c in tiles.HOPPER_ONE_PASS[64] if ONE_LAUNCH}


def test_too_few_heads_for_one_launch_take_two():
    """As on a GPU, where 96 fill the chip."""
    names = on_no_gpu("""
from tfkern.bench.gpu import prewarm
from tfkern.bench.shapes import Shape
for heads in (95, 96):
    print(*dict(prewarm.cases([prewarm.attention(Shape("", 1, heads, 197, 64), "hopper")])))
""")
    kernels = [[word for word in line.split() if word.startswith("flash_bwd")] for line in names]
    two = ["flash_bwd_dq", "flash_bwd_dkdv"]
    assert kernels == [two, ["flash_bwd"] if ONE_LAUNCH else two]


def test_names_of_kernels():
    def named(kernel, constants, blocks=(), **options):
        kernel = types.SimpleNamespace(__name__=kernel)
        return launches.name(types.SimpleNamespace(kernel=kernel, constants=constants, options=options, blocks=blocks))

    tiles = dict(BLOCK_M=128, BLOCK_N=64)
    assert named("flash_fwd", tiles, num_warps=8, num_stages=3) == "flash_fwd 128x64 w8 s3"
    assert named("flash_bwd_dkdv", tiles, [(128, 64)], num_warps=4, num_stages=1) == "flash_bwd_dkdv 128x64 w4 s1 tma"
    hopper = dict(tiles, CONSUMERS=2, STAGES=3)
    assert named("flash_fwd", hopper, [(64, 64)]) == "flash_fwd 2x64 s3"
    assert named("flash_bwd_dkdv", hopper, [(64, 64)]) == "flash_bwd_dkdv 2x128 s3"
    assert named("flash_bwd", dict(hopper, TILES=6, RING=2)) == "flash_bwd 6,2"


@pytest.mark.slow
def test_what_is_prewarmed_is_not_compiled_again(tmp_path):
    """By the real path, in another process, with the same folder of kernels; what needs another kernel compiles one."""
    script = """
from tfkern.bench.gpu import prewarm
from tfkern.testing import Case
case = prewarm.check(Case("small", 1, 16, 16), "portable")
for name, rows in list(prewarm.cases([case]))[:1]:
    for row in rows():
        print(name, row["seconds"] >= 0, row.get("problem"))
"""
    folder = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "1"}
    lines = on_no_gpu(script, **folder)
    c = configs.tile_config("sm_90", "flash_fwd", 2, 16)
    assert [line.split(" #")[0] for line in lines] == [f"flash_fwd {c.block_m}x{c.block_n} w{c.num_warps} s{c.num_stages}"]
    assert lines[0].endswith("True None")
    there = {path.name for path in tmp_path.iterdir()}
    real = """
import os, torch, tfkern
from tfkern.bench import fake_gpu
fake_gpu.pretend()
q, k, v = torch.zeros(3, 3, 1, 200, 16, dtype=torch.bfloat16)
for causal in (False, True):
    tfkern.attention(q, k, v, is_causal=causal)
    print(*os.listdir(os.environ["TRITON_CACHE_DIR"]))
"""
    full, causal = on_no_gpu(real, **folder)
    assert set(full.split()) == there
    assert len(set(causal.split()) - there) == 1


def test_a_kernel_that_does_not_compile_is_a_row():
    """And so is a problem that does not get as far as a launch; the others' kernels are there."""
    lines = on_no_gpu("""
from tfkern.bench.gpu import prewarm
from tfkern.launch import Launch
from tfkern.testing import Case
good = prewarm.check(Case("small", 1, 16, 16), "portable")
bad = prewarm.Problem("bad", lambda: 1 / 0)
cases = dict(prewarm.cases([bad, good]))
print(*cases["bad"]())
def fail(self, features, **tensors):
    raise RuntimeError("PTXAS error")
Launch.by_jit = fail
try:
    print(*cases[list(cases)[-1]]())
except RuntimeError as error:
    print(len(cases), error)
""")
    assert lines == ["{'problem': 'ZeroDivisionError: division by zero'}", "4 PTXAS error"]


def test_a_problem_that_a_backend_declines_is_passed_over():
    """With the backend's reason, and no fault: the run that it prepares has nothing to launch there. Others are compiled."""
    lines = on_no_gpu("""
from tfkern.bench.gpu import peer_faults, prewarm
masked, plain = (next(one for one in peer_faults.FAULTS if one.mask == mask) for mask in ("bool", None))
cases = dict(prewarm.cases(prewarm.fault(one, "hopper") for one in (masked, plain)))
declined = f"{masked.name} hopper"
print(*cases.pop(declined)())
print(*(name.split()[0] for name in cases))
""")
    assert lines[0] == "{'skipped': 'hopper: the backward does not take a mask, the forward does'}"
    assert lines[1].startswith("flash_fwd")


def test_a_candidate_that_needs_too_much_is_passed_over():
    """Those of a table are not: that would be a fault."""
    lines = on_no_gpu("""
import dataclasses
from triton.runtime.errors import OutOfResources
from tfkern.bench.gpu import prewarm, tuning
from tfkern.launch import Launch
def fail(self, features, **tensors):
    raise OutOfResources(300000, 232448, "shared memory")
Launch.by_jit = fail
one = next(tuning.cases())
for own in (False, True):
    ((_, rows),) = prewarm.cases([prewarm.candidate(dataclasses.replace(one, own=own))])
    try:
        print(own, *(row["skipped"].partition(",")[0] for row in rows()))
    except OutOfResources:
        print(own, "raised")
""")
    assert lines == ["False OutOfResources: out of resource: shared memory", "True raised"]


def test_tuning_takes_turns():
    """Every kernel's first comes before any kernel's third; the tables' tiles come first."""
    found = list(tuning.cases())
    assert len({one.name for one in found}) == len(found)
    places = {}
    for index, one in enumerate(found):
        places.setdefault((one.backend, one.kernel, one.shape.name), []).append((index, one.own))
    assert {key[:2] for key in places} == set(candidates.KERNELS)
    assert all(some[0][1] for some in places.values())
    assert max(some[0][0] for some in places.values()) < min(some[2][0] for some in places.values() if len(some) > 2)
    assert all(one.fits for one in found)
    ranked = json.loads(candidates.RANKED.read_text())["best"]
    assert {tuple(key.split()[:2]) for key in ranked} <= set(candidates.KERNELS)
    assert {f"portable flash_{k} {d}" for k in ("fwd", "bwd_dq", "bwd_dkdv") for d in (64, 128)} <= set(ranked)
    assert all(0 < len(best) <= candidates.BEST for best in ranked.values())


@pytest.mark.parametrize("kernel", ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv", "flash_bwd_one_pass"])
def test_tiles_are_verified_before_they_are_timed(monkeypatch, kernel, device):
    monkeypatch.setattr(timing, "milliseconds", lambda *_: (1.0, 2.0, 3.0))
    one = tuning.Candidate("portable", kernel, Shape("small", 1, 1, 40, 16), configs.TileConfig(16, 64), own=False)
    with launches.watched() as seen:
        (row,) = tuning.rows(one, torch.device(device))
    assert row["ms"] == 2.0
    assert row["tiles"] == "16,64,4,2"
    name = "flash_bwd_dkdv" if kernel == "flash_bwd_one_pass" else kernel
    assert f"{name} 16x64 w4 s2" in map(launches.name, seen)
    monkeypatch.setattr(verify, "inputs", lambda *args: TINY_OTHERS)
    (row,) = tuning.rows(one, torch.device(device))
    assert row["problem"].startswith("wrong results: ")


TINY_OTHERS = [x.to(torch.bfloat16) for x in torch.randn(4, 1, 1, 40, 16)]


@pytest.mark.slow
def test_what_is_tuned_gets_as_far_as_the_launch():
    """On a GPU that is not there: the kernel that is tuned is launched, with the tiles that are."""
    lines = on_no_gpu("""
from tfkern.bench import fake_gpu, launches
from tfkern.bench.gpu import tuning
fake_gpu.pretend()
for one in tuning.cases():
    with launches.watched(lambda *_, **__: None) as seen:
        tuning.launch(one, "cpu")
    kernel = {"flash_bwd_one_pass": "flash_bwd_dkdv", "flash_bwd_dkdv_described": "flash_bwd_dkdv"}.get(one.kernel, one.kernel)
    tiles = [x.constants for x in seen if x.kernel.__name__ == kernel][-1]
    if kernel == "flash_bwd_dkdv" and one.backend == "portable":
        assert bool(seen[-1].blocks) == (one.kernel == "flash_bwd_dkdv_described"), one
    wanted = one.config.constants(tiles["BLOCK_D"]) if one.backend == "hopper" else dict(BLOCK_M=one.config.block_m, BLOCK_N=one.config.block_n)
    if one.kernel == "flash_bwd_dkdv" and one.backend == "hopper":
        wanted = one.config.constants(tiles["BLOCK_D"], owns_keys=True)
    print(one.name, "as wanted" if all(tiles.get(k, v) == v for k, v in wanted.items()) else (tiles, wanted))
""")
    assert len(lines) == len(list(tuning.cases()))
    assert [line for line in lines if not line.endswith(" as wanted")] == []
