"""The backward of the Gluon kernels for Hopper: right, free of hazards, and the same bits each time, in the simulator."""

import functools
import importlib
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import tfkern
from tfkern import call, launch, testing, tiles
from tfkern.backends import hopper
from tfkern.bench.launches import watched
from tfkern.problem import lse_of
from tfkern.testing import budget

sys.path.append(str(Path(__file__).resolve().parent))
from gluonsim import SimulationError
from hopper_cases import CASES as FORWARD
from hopper_cases import KERNELS, QUICK, SCHEDULES, TYPES, built, faults, lines, mostly_slow, simulated, slow_but, without
from hopper_cases import SUPPORTED as IN_FORWARD

ALL = (True, True, True)
LOOPS_KEEP_REGISTERS = launch.triton_version() < tiles.HOPPER_ONE_PASS_SPILLS  # else a chip takes two launches, always
CAUSAL, LOWER_RIGHT = testing.CAUSAL, dict(testing.CAUSAL, causal_alignment="lower_right")
# What only the backward in one launch needs: of keys one block and more, of queries as many tiles as fit, several items a program.
LENGTHS = [(1, 1), (63, 65), (64, 64), (65, 63), (197, 197), (300, 300), (512, 512), (512, 70), (70, 512), (128, 1), (1, 300)]
ONE_LAUNCH = [
    *(testing.Case(f"{n_q}x{n_k}", 1, n_q, 64, n_k=n_k) for n_q, n_k in LENGTHS),
    *(testing.Case(f"{n_q}x{n_k}-causal", 1, n_q, 64, n_k=n_k, options=CAUSAL) for n_q, n_k in LENGTHS[5:9]),
    testing.Case("dead-queries-first", 2, 400, 64, n_k=150, options=LOWER_RIGHT),
    testing.Case("dead-queries-last", 2, 400, 64, n_k=150, options=dict(window=(20, 5))),
    testing.Case("dead-keys-first", 2, 100, 64, n_k=500, options=dict(LOWER_RIGHT, window=(50, 0))),
    testing.Case("groups", 4, 100, 64, kv_heads=2, n_k=190, batch=2, options=CAUSAL),
    testing.Case("eight-of-a-group", 16, 40, 40, kv_heads=2, options=dict(window=(30, 10))),
    testing.Case("many-items", 4, 90, 64, batch=3, n_k=140, options=dict(CAUSAL, key_lengths=(140, 0, 33))),
    testing.Case("all-slots-again", 4, 380, 64, n_k=130),
    testing.Case("all-slots-again-groups", 12, 60, 64, kv_heads=2, batch=2, n_k=130, options=CAUSAL),
    testing.Case("all-slots-again-512", 4, 512, 64, n_k=65),
    testing.Case("many-small-items", 5, 33, 64, batch=3, options=dict(key_lengths=(33, 1, 0))),
]  # fmt: skip
CASES = FORWARD | {case.name: case for case in ONE_LAUNCH}
SUPPORTED = [
    name for name in (*IN_FORWARD, *(case.name for case in ONE_LAUNCH))
    if not hopper.backward_limits(built(CASES[name], torch.bfloat16)[1][0])
]  # fmt: skip
with mock.patch.object(hopper, "HOPPER_FULL_CHIP", 0):  # however few heads there are
    FITTING = [name for name in SUPPORTED if hopper.one_pass(built(CASES[name], torch.bfloat16)[1][0])]


@contextmanager
def launches(number: int):
    """The backward in one launch where it fits, or never."""
    with mock.patch.dict(tiles.HOPPER_ONE_PASS, clear=number == 2):
        yield


@functools.cache
def forward(name, dtype=torch.bfloat16):
    """(inputs, out, stats) of a case."""
    inputs, (problem, tensors) = built(CASES[name], dtype)
    with simulated():
        return inputs, *hopper.forward(problem, tensors)


def backward(name, dtype=torch.bfloat16, schedule="lazy", seed=0, dlse=True, needed=ALL, into=None):
    """The gradients of a case; those of slopes and sinks too where it has them."""
    inputs, out, stats = forward(name, dtype)
    _, (problem, tensors) = built(CASES[name], dtype)
    do, given = inputs.do, inputs.dlse
    if problem.packed:  # into the shapes inside of tfkern
        do, given = do.transpose(0, 1).unsqueeze(0), given.unsqueeze(0)
    needed = (*needed, False, problem.has_slopes, problem.has_sinks)
    with simulated(schedule, seed):
        return hopper.backward(problem, tensors, out, stats, do, given if dlse else None, needed, into)


def assert_right(name, grads, inputs):
    truth, plain = budget.truth(CASES[name], inputs), budget.plain(CASES[name], inputs)
    found = dict(zip(("dq", "dk", "dv"), grads[:3], strict=True))
    if CASES[name].lengths:
        found = {key: x.squeeze(0).transpose(0, 1) for key, x in found.items()}
    found |= {f"d{key}": getattr(grads, key).view_as(truth[f"d{key}"]) for key in ("slopes", "sinks") if f"d{key}" in truth}
    for error in budget.judge(found, truth, plain):
        assert error.ok, str(error)


@pytest.mark.parametrize(
    ("name", "number"),
    slow_but(
        lambda name, number: name in QUICK,
        [*((name, 1) for name in FITTING), *((name, 2) for name in SUPPORTED if CASES[name] not in ONE_LAUNCH)],
    ),
    ids=lambda x: {1: "one launch", 2: "two launches"}.get(x, x),
)
@TYPES
def test_backward(name, number, dtype):
    schedules = SCHEDULES if dtype == torch.bfloat16 else SCHEDULES[-1:]
    with launches(number):
        grads = [backward(name, dtype, *schedule) for schedule in schedules]
    assert_right(name, grads[0], forward(name, dtype)[0])
    for schedule, others in zip(schedules, grads, strict=True):  # no sum depends on what comes first
        assert all(map(torch.equal, others[:3], grads[0][:3])), f"{schedule}: other bits"


@pytest.mark.hopper_gpu  # elsewhere the simulator stands in for it
@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_one_launch_on_the_chip(name, dtype, monkeypatch):
    """However few heads there are. test_hopper.py has the same in two launches, as few heads take them by themselves."""
    monkeypatch.setattr(hopper, "HOPPER_FULL_CHIP", 0)
    monkeypatch.setattr(call, "_problems", {})  # they keep launches
    with watched() as seen:
        errors = testing.check(CASES[name], dtype, "hopper", "cuda")
    assert "flash_bwd" in {one.kernel.__name__ for one in seen}
    for error in errors:
        assert error.ok, str(error)


@pytest.mark.parametrize("padded", [False, True], ids=["tensor", "length"])
def test_weights_of_keys_that_are_not_there_may_overflow(padded):
    """In the last block of keys. exp(-lse) is what a key of zeros would weigh."""
    torch.manual_seed(0)
    q, k, v, do = (torch.rand(1, 1, n, 64).to(torch.bfloat16) for n in (200, 70, 70, 200))
    k = k * -100
    lengths = torch.tensor([60]) if padded else None
    problem, tensors = call.build(q, k, v, key_lengths=lengths)
    assert hopper.one_pass(problem)
    with simulated():
        out, stats = hopper.forward(problem, tensors)
        found = hopper.backward(problem, tensors, out, stats, do, None, ALL)
    assert lse_of(stats, problem.scale).max() < -100  # float32 ends at exp(88)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    tfkern.attention(*leaves, key_lengths=lengths, backend="eager").backward(do.float())
    for x, leaf in zip(found, leaves, strict=False):
        torch.testing.assert_close(x.float(), leaf.grad, atol=0.05 * leaf.grad.abs().max().item(), rtol=0.05)


@pytest.mark.parametrize("name", ["several-tiles", "several-tiles-causal"])
def test_without_a_gradient_of_lse(name):
    inputs = forward(name)[0]
    zero = torch.zeros_like(inputs.dlse)
    assert_right(name, backward(name, dlse=False), replace(inputs, dlse=zero, clean_dlse=zero))


@pytest.mark.parametrize("name", ["several-tiles-causal", "window-of-many-tiles", "wide-causal", "padded-causal"])
def test_one_consumer_for_long_sequences(name, monkeypatch):
    """The tables have one for what one can own alone."""
    one = {
        kernel: {dim: found._replace(usual=found.single) for dim, found in table.items()}
        for kernel, table in tiles.HOPPER_BACKWARD.items()
    }
    monkeypatch.setattr(hopper, "HOPPER_BACKWARD", one)
    monkeypatch.setattr(call, "_problems", {})  # they keep launches
    with launches(2):
        assert_right(name, backward(name), forward(name)[0])


def test_only_what_is_needed():
    """Of two launches. One makes all; of dQ alone, the kernel for dQ is less work."""
    for needed in ((True, False, False), (False, False, True)):
        with launches(2):
            grads, everything = backward("several-tiles", needed=needed), backward("several-tiles")
        assert [x is not None for x in grads[:3]] == [True, needed[2], needed[2]]
        assert all(torch.equal(x, y) for x, y in zip(grads, everything, strict=True) if x is not None)
    assert all(map(torch.equal, backward("several-tiles", needed=(True, False, False))[:1], everything))
    assert all(map(torch.equal, backward("several-tiles", needed=(False, False, True))[:3], backward("several-tiles")))


@pytest.mark.parametrize("how", ["packed", "unaligned"])
def test_gradients_into_given_memory(how):
    """What TMA can't write is copied there."""
    shape = forward("several-tiles")[0].tensors["query"].shape
    b, h, n, d = shape
    if how == "packed":
        into = call.unpack(torch.empty(b, n, 3, h, d, dtype=torch.bfloat16))
    else:
        into = tuple(torch.empty(b * h * n * d + 1, dtype=torch.bfloat16)[1:].view(shape) for _ in range(3))
    grads = backward("several-tiles", into=into)
    assert all(x is y for x, y in zip(grads, into, strict=False))
    assert all(map(torch.equal, grads[:3], backward("several-tiles")[:3]))


# Why nothing is wrong without it.
HARMLESS = {
    "fence_async_shared()  # for the barriers": "the fence after mbarrier.init, which the simulator does not model",
    "mbarrier.wait(memory.full.index(stage), phase)  # already complete; this branch keeps ptxas from reordering": "as it says",
}
OF_TWO = ["several-tiles-causal", "window-of-many-tiles", "cut-inside", "packed-long"]
OF_ONE = ["window-of-many-tiles", "groups", "many-items", "dead-queries-first", "all-slots-again"]
# Problems that go through all of a kernel.
THROUGH = {"flash_bwd": OF_ONE, "flash_bwd_dq": OF_TWO, "flash_bwd_dkdv": OF_TWO}
# Files with what synchronises, and the kernel that each is part of.
PARTS = {name: name for name in THROUGH} | {
    "flash_bwd_consume": "flash_bwd",
    "flash_bwd_gather": "flash_bwd",
    "flash_bwd_dq_consume": "flash_bwd_dq",
    "flash_bwd_dkdv_consume": "flash_bwd_dkdv",
    "loads": "flash_bwd_dq",
}
FAULTS = [(file, line) for file in PARTS for line in faults(file)]


@functools.cache
def expected(name):
    """The gradients by another backend."""
    inputs = forward(name)[0]
    function = tfkern.attention_varlen if CASES[name].lengths else tfkern.attention
    grads = budget.results(function, replace(inputs, tensors=inputs.clean, do=inputs.clean_do, dlse=inputs.clean_dlse),
                           backend="eager")  # fmt: skip
    found = grads["dq"], grads["dk"], grads["dv"]
    return [x.transpose(0, 1).unsqueeze(0) for x in found] if CASES[name].lengths else found


def faults_found(name: str, kernel, monkeypatch) -> str | None:
    """What shows that a kernel is broken, on problems that go through all of it."""
    monkeypatch.setattr(importlib.import_module(f"tfkern.kernels.hopper.{name}"), name, kernel)
    monkeypatch.setattr(call, "_problems", {})  # they keep launches of the kernel as it was
    for case in THROUGH[name]:
        for schedule, seed in SCHEDULES:
            try:
                with launches(1 if name == "flash_bwd" else 2):
                    grads = backward(case, torch.bfloat16, schedule, seed)
            except (SimulationError, UnboundLocalError) as error:
                return repr(error)
            for x, y in zip(grads, expected(case), strict=False):
                if not torch.allclose(x.float(), y.float(), atol=0.1, rtol=0.05):
                    return "wrong results"
    return None


@pytest.mark.parametrize(("name", "line"), mostly_slow(FAULTS, 16), ids=str)
def test_every_missing_synchronisation_is_found(name, line, tmp_path, monkeypatch):
    text = lines(name)[line].strip()
    kernel = PARTS[name]
    found = faults_found(kernel, without(kernel, name, line, tmp_path), monkeypatch)
    assert found or text in HARMLESS, text
    assert not (found and text in HARMLESS), f"{text} does harm after all: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("name", THROUGH)
def test_the_kernels_themselves_are_whole(name, monkeypatch):
    kernel = getattr(importlib.import_module(f"tfkern.kernels.hopper.{name}"), name)
    assert faults_found(name, kernel, monkeypatch) is None


@pytest.mark.slow
def test_the_compiler_overlaps_what_it_should():
    """As of the forward, in test_hopper.py; make gate has the rest."""
    command = [
        sys.executable,
        "-m",
        "bench.static.hopper_gate",
        "--kernel",
        *THROUGH,
        "--head-dim",
        "64",
        "--variant",
        "causal",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=KERNELS.parent.parent, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("exp2 under a wgmma") == (6 if LOOPS_KEEP_REGISTERS else 4)


@pytest.mark.slow
@pytest.mark.skipif(not LOOPS_KEEP_REGISTERS, reason="Triton 3.8 and newer spill in the one launch's loops: two are taken")
def test_one_launch_past_the_jit():
    """On a GPU that is not there: two compilations serve all lengths, and each backward is one launch."""
    script = """
import torch
from tfkern import call, launch
from tfkern.backends import hopper
from tfkern.bench import fake_gpu
launched, by_jit = [], []
fake_gpu.pretend(launcher=lambda *args: launched.append(args[:3]))
original = launch.Launch.by_jit
launch.Launch.by_jit = lambda *a, **t: (by_jit.append(1), original(*a, **t))[1]
for n in (1, 197, 197, 384, 385, 512):
    q = torch.empty(32, 3, n, 64, dtype=torch.bfloat16)  # as many heads as fill a chip
    hopper.backward(*call.build(q, q, q, is_causal=True), q, torch.empty(32, 3, 2, n), q, None, (True,) * 3 + (False,) * 3)
print(len(by_jit), launched)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == f"2 {[(96, 1, 1)] * 6}", done.stdout + done.stderr[-2000:]
