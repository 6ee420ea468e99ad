"""The Gluon kernels for Hopper: right, and free of hazards, in the simulator; what the compiler makes of them; when they decline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import call, testing, tiles
from tfkern.backends import hopper
from tfkern.testing import budget

sys.path += [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "bench")]
import candidates
import sass
from gluonsim import SimulationError
from hopper_cases import CASES, KERNELS, SCHEDULES, SUPPORTED, built, faults, forward, lines, simulated, without


def test_what_is_supported():
    """So that no case falls away in silence."""
    assert len(SUPPORTED) >= 90, SUPPORTED


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_forward(name, dtype):
    inputs, (problem, tensors) = built(CASES[name], dtype)
    truth, plain = budget.truth(CASES[name], inputs), budget.plain(CASES[name], inputs)
    for schedule, seed in SCHEDULES if dtype == torch.bfloat16 else SCHEDULES[-1:]:
        with simulated(schedule, seed):
            found = dict(zip(("out", "lse"), forward(CASES[name], problem, tensors), strict=True))
        for error in budget.judge(found, truth, plain):
            assert error.ok, f"{schedule} {seed}: {error}"


HOPPER = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not HOPPER, reason="needs an H100 or H200; the simulator stands in for it")
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_on_the_chip(name, dtype):
    for error in testing.check(CASES[name], dtype, "hopper", "cuda"):
        assert error.ok, str(error)


@pytest.mark.parametrize("name", ["several-tiles-causal", "packed-long", "window-of-many-tiles"])
@pytest.mark.parametrize("config", candidates.HOPPER["flash_fwd"], ids=str)
def test_every_candidate_of_tuning(config, name, monkeypatch):
    """One to three consumers, taking turns or not, more stages: what `make gpu` times must be right."""
    monkeypatch.setitem(tiles.HOPPER, 64, tiles.HOPPER[64]._replace(main=tiles.HopperConfig(*config), wide=None))
    monkeypatch.setattr(call, "_problems", {})  # they keep launches
    inputs, (problem, tensors) = built(CASES[name], torch.bfloat16)
    with simulated("random", 3):
        found = dict(zip(("out", "lse"), forward(CASES[name], problem, tensors), strict=True))
    for error in budget.judge(found, budget.truth(CASES[name], inputs), budget.plain(CASES[name], inputs)):
        assert error.ok, str(error)


@pytest.mark.parametrize(
    ("n", "consumers"), [(64, 1), (65, 2), (128, 2), (197, 2), (256, 2), (512, 3), (577, 2), (1024, 3), (2048, 3)]
)
def test_consumers_by_length(n, consumers):
    """Three own 192 queries: at 197 and 577 most of the last tile would be empty."""
    q = torch.empty(1, 1, n, 64, dtype=torch.bfloat16)
    assert hopper._config(call.build(q, q, q)[0])[1].consumers == consumers


FAULTS = faults("flash_fwd")
# Why nothing is wrong without it.
HARMLESS = {
    "fence_async_shared()  # for the barriers": "the fence after mbarrier.init, which the simulator does not model",
}


def faults_found(kernel, monkeypatch) -> str | None:
    """What shows that a kernel is broken, on problems that go through all of it."""
    from tfkern.kernels.hopper import flash_fwd

    monkeypatch.setattr(flash_fwd, "flash_fwd", kernel)
    monkeypatch.setattr(call, "_problems", {})  # they keep launches of the kernel as it was
    for name in ("several-tiles-causal", "window-of-many-tiles", "cut-inside", "packed-long", "d256-causal", "hidden-keys"):
        case = CASES[name]
        inputs, (problem, tensors) = built(case, torch.bfloat16)
        function = tfkern.attention_varlen if case.lengths else tfkern.attention
        want = function(**inputs.clean, enable_gqa=True, **inputs.options, backend="eager")
        for schedule, seed in SCHEDULES:
            try:
                with simulated(schedule, seed):
                    out, _ = forward(case, problem, tensors)
            except (SimulationError, UnboundLocalError) as error:
                return repr(error)
            if not torch.allclose(out.float(), want.float(), atol=0.05):
                return "wrong results"
    return None


@pytest.mark.parametrize("line", FAULTS, ids=lambda n: f"{n + 1}:{lines('flash_fwd')[n].strip()[:40]}")
def test_every_missing_synchronisation_is_found(line, tmp_path, monkeypatch):
    text = lines("flash_fwd")[line].strip()
    found = faults_found(without("flash_fwd", line, tmp_path).flash_fwd, monkeypatch)
    assert found or text in HARMLESS, text
    assert not (found and text in HARMLESS), f"{text} does harm after all: {found}"


def test_the_kernel_itself_is_whole(monkeypatch):
    from tfkern.kernels.hopper import flash_fwd

    assert faults_found(flash_fwd.flash_fwd, monkeypatch) is None


def test_the_compiler_overlaps_what_it_should(tmp_path):
    """0 spills, no serialised wgmma, every exponential of a loop under a product, no operand overwritten; see the gate."""
    gate = KERNELS.parent.parent / "bench" / "hopper_gate.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    some = ["--kernel", "flash_fwd", "--head-dim", "64", "--variant", "full", "everything"]  # make gate has all
    done = subprocess.run([sys.executable, gate, *some], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("exp2 under a wgmma") == 4


WGMMA = """
    /*0010*/ HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0 ;
    /*0020*/ MUFU.EX2 R5, R1 ;
    /*0030*/ {between} ;
    /*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0050*/ {after} ;
    /*0060*/ BRA 0x10 ;
"""


@pytest.mark.parametrize(
    ("between", "after", "exposed", "clobbered"),
    [("NOP", "NOP", 0, 0), ("NOP", "MUFU.EX2 R6, R1", 1, 0), ("FADD R9, R1, R1", "FADD R10, R1, R1", 0, 1), ("LDS.128 R6, [R1]", "NOP", 0, 1)],
)  # fmt: skip
def test_the_gate_sees_what_is_wrong(between, after, exposed, clobbered):
    body = sass.parse(WGMMA.format(between=between, after=after))
    assert (sass.exposed(body), len(sass.clobbered(body))) == (exposed, clobbered)


def test_it_declines_with_reasons():
    q = torch.randn(1, 2, 8, 64)
    with pytest.raises(tfkern.UnsupportedError, match=r"float16 and bfloat16, not torch\.float32"):
        tfkern.attention(q, q, q, backend="hopper")
    h = q.bfloat16()
    text = tfkern.explain(h, h, h, scale=-1.0, backend="hopper")
    assert "sm_90" in text
    assert "scale must be a number > 0" in text
    assert "hopper" not in tfkern.explain(h, h, h)  # not by default, until a GPU has shown it right and faster


@pytest.mark.parametrize("how", ["strided", "unaligned", "expanded", "negated"])
def test_what_tma_cannot_read_is_copied(how):
    make = {
        "strided": lambda x: torch.randn(*x.shape[:3], 2 * x.shape[3])[..., ::2].bfloat16(),
        "unaligned": lambda x: torch.randn(x.numel() + 1).bfloat16()[1:].view(x.shape),
        "expanded": lambda x: x[:, :1].expand(x.shape),
        "negated": torch._neg_view,
    }[how]
    q, k, v = (make(torch.randn(1, 2, 70, 64).bfloat16()) for _ in range(3))
    problem, tensors = call.build(q, k, v)
    with simulated():
        out, _ = hopper.forward(problem, tensors)
    torch.testing.assert_close(
        out.float(), tfkern.attention(q.float(), k.float(), v.float(), backend="eager"), atol=0.02, rtol=0.02
    )


def test_a_second_call_launches_past_the_jit():
    """On a GPU that is not there: the handle of the first call is used again, at another length too."""
    script = """
import torch
from tfkern import call, launch
from tfkern.backends import hopper
from tfkern.bench import fake_gpu
launched, by_jit = [], []
fake_gpu.pretend(launcher=lambda *args: launched.append(args[:3]))
original = launch.Launch.by_jit
launch.Launch.by_jit = lambda self, *a: (by_jit.append(1), original(self, *a))[1]
for n in (197, 197, 250, 577):  # all with two consumers
    q = torch.empty(2, 3, n, 64, dtype=torch.bfloat16)
    hopper.forward(*call.build(q, q, q, is_causal=True))
q = q.half()
hopper.forward(*call.build(q, q, q, is_causal=True))
print(len(by_jit), launched)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == f"2 {[(3, 1, 1)] * 5}", done.stdout + done.stderr[-2000:]
