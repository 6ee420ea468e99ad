"""The backward of the Gluon kernels for Hopper: right, free of hazards, and the same bits each time, in the simulator."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import call, tiles
from tfkern.backends import hopper
from tfkern.testing import budget

sys.path.append(str(Path(__file__).resolve().parent))
from gluonsim import SimulationError
from hopper_cases import CASES, KERNELS, SCHEDULES, built, faults, lines, simulated, without
from hopper_cases import SUPPORTED as FORWARD

ALL = (True, True, True)
SUPPORTED = [name for name in FORWARD if not hopper.backward_limits(built(CASES[name], torch.bfloat16)[1][0])]


@functools.cache
def forward(name, dtype=torch.bfloat16):
    """(inputs, out, lse) of a case."""
    inputs, (problem, tensors) = built(CASES[name], dtype)
    with simulated():
        return inputs, *hopper.forward(problem, tensors)


def backward(name, dtype=torch.bfloat16, schedule="lazy", seed=0, dlse=True, needed=ALL, into=None):
    """The gradients of a case."""
    inputs, out, lse = forward(name, dtype)
    problem, tensors = call.build(**inputs.tensors, enable_gqa=True, **inputs.options)
    with simulated(schedule, seed):
        return hopper.backward(problem, tensors, out, lse, inputs.do, inputs.dlse if dlse else None, needed, into)


def assert_right(name, grads, inputs):
    truth, plain = budget.truth(CASES[name], inputs), budget.plain(CASES[name], inputs)
    for error in budget.judge(dict(zip(("dq", "dk", "dv"), grads[:3], strict=True)), truth, plain):
        assert error.ok, str(error)


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_backward(name, dtype):
    schedules = SCHEDULES if dtype == torch.bfloat16 else SCHEDULES[-1:]
    grads = [backward(name, dtype, *schedule)[:3] for schedule in schedules]
    assert_right(name, grads[0], forward(name, dtype)[0])
    for schedule, others in zip(schedules, grads, strict=True):  # no sum depends on what comes first
        assert all(map(torch.equal, others, grads[0])), f"{schedule}: other bits"


def test_without_a_gradient_of_lse():
    inputs = forward("several-tiles-causal")[0]
    zero = torch.zeros_like(inputs.dlse)
    assert_right(
        "several-tiles-causal", backward("several-tiles-causal", dlse=False), replace(inputs, dlse=zero, clean_dlse=zero)
    )


@pytest.mark.parametrize("name", ["several-tiles-causal", "window-of-many-tiles", "wide-causal", "padded-causal"])
def test_one_consumer_for_long_sequences(name, monkeypatch):
    """The tables have one for what one can own alone."""
    one = {kernel: {dim: (few, few) for dim, (_, few) in table.items()} for kernel, table in tiles.HOPPER_BACKWARD.items()}
    monkeypatch.setattr(hopper, "HOPPER_BACKWARD", one)
    monkeypatch.setattr(call, "_problems", {})  # they keep launches
    assert_right(name, backward(name), forward(name)[0])


def test_only_what_is_needed():
    for needed in ((True, False, False), (False, False, True)):
        grads = backward("several-tiles", needed=needed)
        assert [x is not None for x in grads[:3]] == [True, needed[2], needed[2]]
        assert all(torch.equal(x, y) for x, y in zip(grads, backward("several-tiles"), strict=True) if x is not None)


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
    "mbarrier.wait(full.index(stage), phase)  # passed long ago, but a branch": "it keeps ptxas from moving a wait up",
}
FAULTS = [(name, line) for name in ("flash_bwd_dq", "flash_bwd_dkdv") for line in faults(name)]


@functools.cache
def expected(name):
    """The gradients by another backend."""
    inputs = forward(name)[0]
    grads = budget.results(tfkern.attention, replace(inputs, tensors=inputs.clean, do=inputs.clean_do, dlse=inputs.clean_dlse),
                           backend="eager")  # fmt: skip
    return grads["dq"], grads["dk"], grads["dv"]


def faults_found(name: str, kernel, monkeypatch) -> str | None:
    """What shows that a kernel is broken, on problems that go through all of it."""
    import tfkern.kernels.hopper.flash_bwd_dkdv
    import tfkern.kernels.hopper.flash_bwd_dq

    monkeypatch.setattr(getattr(tfkern.kernels.hopper, name), name, kernel)
    monkeypatch.setattr(call, "_problems", {})  # they keep launches of the kernel as it was
    for case in ("several-tiles-causal", "window-of-many-tiles", "cut-inside"):
        for schedule, seed in SCHEDULES:
            try:
                grads = backward(case, torch.bfloat16, schedule, seed)
            except (SimulationError, UnboundLocalError) as error:
                return repr(error)
            for x, y in zip(grads, expected(case), strict=False):
                if not torch.allclose(x.float(), y.float(), atol=0.1, rtol=0.05):
                    return "wrong results"
    return None


@pytest.mark.parametrize(("name", "line"), FAULTS, ids=[f"{name}-{n + 1}:{lines(name)[n].strip()[:40]}" for name, n in FAULTS])
def test_every_missing_synchronisation_is_found(name, line, tmp_path, monkeypatch):
    text = lines(name)[line].strip()
    found = faults_found(name, without(name, line, tmp_path), monkeypatch)
    assert found or text in HARMLESS, text
    assert not (found and text in HARMLESS), f"{text} does harm after all: {found}"


@pytest.mark.parametrize("name", ["flash_bwd_dq", "flash_bwd_dkdv"])
def test_the_kernels_themselves_are_whole(name, monkeypatch):
    import tfkern.kernels.hopper.flash_bwd_dkdv
    import tfkern.kernels.hopper.flash_bwd_dq

    assert faults_found(name, getattr(getattr(tfkern.kernels.hopper, name), name), monkeypatch) is None


def test_the_compiler_overlaps_what_it_should():
    """As of the forward, in test_hopper.py; make gate has the rest."""
    gate = KERNELS.parent.parent / "bench" / "hopper_gate.py"
    command = [sys.executable, gate, "--kernel", "flash_bwd_dq", "flash_bwd_dkdv", "--head-dim", "64", "--variant", "causal"]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("exp2 under a wgmma") == 4
