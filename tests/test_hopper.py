"""The Gluon kernels for Hopper: right, and free of hazards, in the simulator; what the compiler makes of them; when they decline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import backends, call, launch, ops, testing, tiles
from tfkern.backends import hopper
from tfkern.bench.static import candidates, sass
from tfkern.testing import budget

sys.path.append(str(Path(__file__).resolve().parent))
from gluonsim import SimulationError
from hopper_cases import (
    CASES,
    KERNELS,
    QUICK,
    SCHEDULES,
    SHORT,
    SUPPORTED,
    TYPES,
    built,
    faults,
    forward,
    lines,
    mostly_slow,
    only,
    simulated,
    slow_but,
    tight,
    without,
)


def test_what_is_supported():
    """So that no case falls away in silence."""
    assert len(SUPPORTED) >= 90, SUPPORTED
    assert len(SHORT) >= 26, SHORT


FORMS = [("flash_fwd", name) for name in SUPPORTED] + [("flash_fwd_short", name) for name in SHORT]


@pytest.mark.parametrize(("form", "name"), slow_but(lambda form, name: name in QUICK, FORMS))
@TYPES
def test_forward(form, name, dtype):
    inputs = built(CASES[name], dtype)[0]
    with only(form, stages=tight(CASES[name])):
        _, (problem, tensors) = built(CASES[name], dtype)
        for schedule, seed in SCHEDULES if dtype == torch.bfloat16 else SCHEDULES[-1:]:
            with simulated(schedule, seed):
                found = dict(zip(("out", "lse"), forward(CASES[name], problem, tensors), strict=True))
            for error in budget.assess(CASES[name], inputs, found):
                assert error.ok, f"{schedule} {seed}: {error}"


@pytest.mark.hopper_gpu  # elsewhere the simulator stands in for it
@pytest.mark.parametrize(("form", "name"), FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_on_the_chip(form, name, dtype):
    """Forward and backward; the forward alone where it has no backward."""
    case = CASES[name]
    with only(form):
        if hopper.backward_limits(built(case, dtype)[1][0]):
            errors = forward_errors(case, testing.make_inputs(case, dtype, "cuda"))
        else:
            errors = testing.check(case, dtype, "hopper", "cuda")
    for error in errors:
        assert error.ok, str(error)


def forward_errors(case, inputs) -> list[testing.Error]:
    function = tfkern.attention_varlen if case.lengths else tfkern.attention
    with torch.random.fork_rng():
        torch.manual_seed(1234)  # as budget.results
        found = function(**inputs.tensors, enable_gqa=True, return_lse=True, **inputs.options, backend="hopper")
    return budget.assess(case, inputs, dict(zip(("out", "lse"), found, strict=True)))


TUNED = [
    (form, config, name)
    for form, names in {
        "flash_fwd": ("several-tiles-causal", "packed-long", "window-of-many-tiles"),
        "flash_fwd_short": ("several-tiles-causal", "softcap-causal"),
    }.items()
    for config in candidates.HOPPER[form]
    for name in names
]


@pytest.mark.parametrize(
    ("form", "config", "name"), slow_but(lambda form, config, name: name == "several-tiles-causal", TUNED), ids=str
)
def test_every_candidate_of_tuning(form, config, name, monkeypatch):
    """One to three consumers, taking turns or not, more stages: what `make gpu` times must be right."""
    monkeypatch.setitem(tiles.HOPPER, 64, tiles.HOPPER[64].alone(tiles.HopperConfig(*config), form == "flash_fwd_short"))
    monkeypatch.setattr(call, "_problems", {})  # they keep launches
    inputs, (problem, tensors) = built(CASES[name], torch.bfloat16)
    with simulated("random", 3):
        found = dict(zip(("out", "lse"), forward(CASES[name], problem, tensors), strict=True))
    for error in budget.assess(CASES[name], inputs, found):
        assert error.ok, str(error)


def test_what_is_never_short():
    """Windows, packed sequences, masks, dropout, other head dims, and few queries."""
    assert not {"packed", "window", "window-left", "bias", "bool-mask", "dropout", "d128", "decode"} & set(SHORT)


PARTS = {"flash_fwd": ("flash_fwd", "attend"), "flash_fwd_short": ("flash_fwd_short",)}
FAULTS = [(form, part, line) for form, parts in PARTS.items() for part in parts for line in faults(part)]
# Why nothing is wrong without it.
HARMLESS = {
    "fence_async_shared()  # for the barriers": "the fence after mbarrier.init, which the simulator does not model",
    "meet()  # all warps of this consumer have read Q": "warps of a partition, which run in step in the simulator",
}
TELLING = {
    "flash_fwd": ("several-tiles-causal", "window-of-many-tiles", "cut-inside", "packed-long", "d256-causal", "hidden-keys"),
    "flash_fwd_short": ("many-heads", "several-tiles", "padded-causal"),
}


def faults_found(form, kernel, monkeypatch) -> str | None:
    """What shows that a kernel is broken, on problems that go through all of it."""
    from tfkern.kernels.hopper import flash_fwd, flash_fwd_short

    monkeypatch.setattr({"flash_fwd": flash_fwd, "flash_fwd_short": flash_fwd_short}[form], form, kernel)
    for name in TELLING[form]:
        case = CASES[name]
        with only(form, stages=5):  # so few that they are soon used again
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


@pytest.mark.parametrize(("form", "part", "line"), mostly_slow(FAULTS, 16), ids=str)
def test_every_missing_synchronisation_is_found(form, part, line, tmp_path, monkeypatch):
    text = lines(part)[line].strip()
    found = faults_found(form, without(form, part, line, tmp_path), monkeypatch)
    assert found or text in HARMLESS, text
    assert not (found and text in HARMLESS), f"{text} does harm after all: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("form", TELLING)
def test_the_kernels_themselves_are_whole(form, monkeypatch):
    from tfkern.kernels.hopper import flash_fwd, flash_fwd_short

    kernel = {"flash_fwd": flash_fwd.flash_fwd, "flash_fwd_short": flash_fwd_short.flash_fwd_short}[form]
    assert faults_found(form, kernel, monkeypatch) is None


@pytest.mark.slow
def test_the_compiler_overlaps_what_it_should(tmp_path):
    """0 spills, no serialised wgmma, every exponential of a loop under a product, no operand overwritten; see the gate."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    some = ["--kernel", "flash_fwd", "--head-dim", "64", "--variant", "full", "everything"]  # make gate has all
    done = subprocess.run(
        [sys.executable, "-m", "bench.static.hopper_gate", *some],
        capture_output=True,
        text=True,
        env=environment,
        cwd=KERNELS.parent.parent,
        check=False,
    )
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
    wide = torch.randn(1, 2, 8, 256).bfloat16()
    assert "several" in tfkern.explain(wide, wide, wide, softcap=2.0, dropout_p=0.1, backend="hopper")
    assert "hopper" not in tfkern.explain(h, h, h)  # not by default, until a GPU has shown it right and faster


def test_it_declines_what_only_its_forward_takes(monkeypatch):
    """Its name stands for both directions: no other backend's backward behind its forward."""
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    q, wide = (torch.empty(1, 2, 8, dim, dtype=torch.bfloat16) for dim in (64, 256))
    mask = torch.zeros(8, 8)
    for reason, x, options in (
        ("an additive mask", q, dict(attn_mask=mask)), ("a mask", q, dict(attn_mask=mask > 0)), ("head dims beyond 128", wide, {}),
        ("several of dropout, softcap, ALiBi and score_mod", q, dict(softcap=2.0, dropout_p=0.1)),
    ):  # fmt: skip
        problem, _ = call.build(x, x, x, **options)
        assert backends.choose(problem, "hopper") is backends.BACKENDS["hopper"]
        with pytest.raises(tfkern.UnsupportedError, match=f"hopper: the backward does not take {reason}"):
            backends.choose(problem, "hopper", needs_grad=True)
        monkeypatch.setenv("TFKERN_BACKENDS", "hopper,portable")
        assert backends.choose(problem) is backends.BACKENDS["hopper"]
        assert backends.choose(problem, needs_grad=True) is backends.BACKENDS["portable"]
        assert backends.explain(problem, needs_grad=True).startswith("portable runs forward and backward of Problem(")
        monkeypatch.delenv("TFKERN_BACKENDS")


@pytest.fixture
def launched(monkeypatch):
    """The names of kernels launched on an H100 that is not there."""
    names = []
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, *_: names.append(self.kernel.__name__))
    backends._choose.cache_clear()
    yield names
    backends._choose.cache_clear()


def by_op(q, k, v, mask, **options):
    tensors, asked = ops.op_arguments(*call.given(q, k, v, mask), **options)
    return torch.ops.tfkern.attention(*tensors, *asked)[0]


def compiled(*tensors, **options):
    torch._dynamo.reset()
    return torch.compile(tfkern.attention, fullgraph=True, backend="aot_eager")(*tensors, **options)


@pytest.mark.parametrize("attend", [tfkern.attention, by_op, compiled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("leaf", ["query", "mask"])
def test_it_declines_a_call_whose_backward_it_has_not(attend, leaf, launched):
    """By its name it runs the same call without grad, and explain tells both."""
    q, k, v = (torch.randn(1, 2, 9, 64).bfloat16() for _ in range(3))
    mask, reason = torch.randn(9, 9), "hopper: the backward does not take an additive mask"
    tensors, options = (q, k, v, mask), dict(backend="hopper")
    attend(*tensors, **options)
    assert tfkern.explain(*tensors, **options).startswith("hopper runs ")
    (q if leaf == "query" else mask).requires_grad_()
    with pytest.raises(tfkern.UnsupportedError, match=reason):
        attend(*tensors, **options)
    assert reason in tfkern.explain(*tensors, **options)
    with torch.no_grad():
        attend(*tensors, **options)
        assert tfkern.explain(*tensors, **options).startswith("hopper runs ")
    assert launched == ["flash_fwd", "flash_fwd"]
    if attend is not compiled:  # which transforms from outside don't take
        with pytest.raises(tfkern.UnsupportedError, match=reason):
            torch.func.grad(lambda q: attend(q, *(x.detach() for x in tensors[1:]), **options).sum())(q.detach())


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
    launches = [(12, 1, 1)] * 3 + [(30, 1, 1)] * 2  # tiles of 128 queries, of which each has a multiprocessor
    assert done.stdout.strip() == f"2 {launches}", done.stdout + done.stderr[-2000:]
