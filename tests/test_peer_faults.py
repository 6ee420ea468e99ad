"""Scores so far below zero that exp(-lse) overflows, at the sizes where other kernels give NaN gradients: ours are right.

bench/gpu/peer_faults.py tells whose and where; here each of our backends gets those problems.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import call, configs, testing
from tfkern.backends import hopper
from tfkern.bench.gpu.peer_faults import FAULTS, HEAD_DIM, SCORE, cases, rows
from tfkern.problem import lse_of
from tfkern.testing import budget

sys.path.append(str(Path(__file__).resolve().parent))
from hopper_cases import simulated

NAMES = [fault.name for fault in FAULTS]
DTYPES = [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.float32, torch.float16))]
EACH = pytest.mark.parametrize("fault", FAULTS, ids=NAMES)


def with_gradient_of_the_mask(inputs: testing.Inputs) -> testing.Inputs:
    """An additive mask as one more differentiable tensor."""
    options = dict(inputs.options)
    if "attn_mask" not in options or options["attn_mask"].dtype == torch.bool:
        return inputs
    tensors = {**inputs.tensors, "attn_mask": options.pop("attn_mask")}
    return replace(inputs, tensors=tensors, clean=tensors, options=options)


def assert_right(fault, inputs: testing.Inputs, found: dict) -> None:
    errors = budget.assess(fault.case, inputs, found)
    assert all(e.ok for e in errors), "\n" + "\n".join(map(str, errors))


@EACH
def test_the_problem_is_what_it_should_be(fault):
    truth = testing.truth(fault.case, fault.inputs(torch.float64))
    assert truth["lse"].max() < -88.7
    assert truth["lse"].min() > SCORE - 5
    assert all(x.isfinite().all() for x in truth.values())


def test_known_faults_are_among_them():
    assert {fault.mask for fault in FAULTS if fault.n_k % 128 == 64} >= {"bool", "float"}
    assert any((fault.n_q, fault.n_k, HEAD_DIM) == (1, 128, 64) for fault in FAULTS)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["eager", "portable"])
def test_ours_are_right(fault, backend, dtype, device):
    inputs = with_gradient_of_the_mask(fault.inputs(dtype, device))
    assert_right(fault, inputs, testing.results(tfkern.attention, inputs, backend=backend))


@EACH
def test_a_backward_in_one_pass(fault, device):
    """The portable kernels take two where there are more than 64 keys."""
    inputs = with_gradient_of_the_mask(fault.inputs(torch.bfloat16, device))
    with configs.override(flash_bwd_one_pass=configs.TileConfig(32, 256, 8, 1)):
        assert_right(fault, inputs, testing.results(tfkern.attention, inputs, backend="portable"))


@EACH
def test_the_kernels_for_hopper_are_right(fault):
    """In the simulator; with a mask they have no backward."""
    inputs = fault.inputs(torch.bfloat16)
    problem, tensors = call.build(**inputs.tensors, **inputs.options)
    needed = (True,) * 3 + (False,) * 3
    with simulated():
        out, stats = hopper.forward(problem, tensors)
        found = dict(out=out, lse=lse_of(stats, problem.unit(tensors)))
        if fault.mask is None:
            made = hopper.backward(problem, tensors, out, stats, inputs.do, inputs.dlse, needed)
            found |= dict(dq=made.q, dk=made.k, dv=made.v)
    assert bool(hopper.backward_limits(problem)) == (fault.mask is not None)
    assert_right(fault, inputs, found)


def test_the_rows_of_the_table(device, monkeypatch):
    """A row for every fault and provider: a peer's NaN is told, ours is a problem."""
    named = dict(cases(torch.float32, torch.device(device)))
    assert len(named) == len(FAULTS) * 8
    (row,) = named["one query, 128 keys, sdpa math"]()
    assert row["finite"] == dict(out=True, dq=True, dk=True, dv=True)
    (row,) = named["192 keys, float mask, sdpa default"]()
    assert "wrong" not in row
    assert row["kernels"] == ["FLASH_ATTENTION"]  # on a CPU
    (row,) = named["192 keys, tfkern hopper"]()
    assert "float32" in row["skipped"]

    def nan_gradient(self, *args, **options):
        return args[0] * torch.nan

    for name, key in (("tfkern eager", "problem"), ("sdpa math", "wrong")):
        monkeypatch.setattr("tfkern.bench.gpu.peer_faults._function", lambda name: lambda q, k, v, **o: Nan.apply(q, k, v))
        (row,) = rows(FAULTS[5], name, torch.float32, torch.device(device))
        assert row["finite"] == dict(out=True, dq=True, dk=False, dv=True)
        assert "dk: error nan" in row[key]


class Nan(torch.autograd.Function):
    """Has a dk of NaN."""

    @staticmethod
    def forward(ctx, q, k, v):
        return q.clone()

    @staticmethod
    def backward(ctx, do):
        key = torch.zeros(1, 1, 128, 64)
        return do, key * torch.nan, key
