"""Which backend runs, how that is told, and that importing needs neither Triton nor a GPU."""

import os
import subprocess

import pytest
import torch

import tfkern
from tfkern import backends, call

pytestmark = pytest.mark.cpu  # the choices tested are those for CPU tensors


def problem(**changes):
    q = torch.empty(1, 2, 4, 16, **changes)
    return call.build(q, q, q)[0]


def test_a_cpu_tensor_goes_to_cpu_by_default():
    assert backends.choose(problem()) is backends.BACKENDS["cpu"]
    assert backends.choose(problem(), "eager") is backends.BACKENDS["eager"]
    assert backends.choose(problem(), "portable") is backends.BACKENDS["portable"]


def test_environment_variable_sets_the_order(monkeypatch):
    monkeypatch.setenv("TFKERN_BACKENDS", "portable, eager")
    assert backends.choose(problem()) is backends.BACKENDS["portable"]
    assert backends.choose(problem(dtype=torch.float64)) is backends.BACKENDS["eager"]
    monkeypatch.setenv("TFKERN_BACKENDS", "portable")
    with pytest.raises(tfkern.UnsupportedError, match="float64"):
        backends.choose(problem(dtype=torch.float64))
    monkeypatch.setenv("TFKERN_BACKENDS", "quick")
    with pytest.raises(ValueError, match=r"TFKERN_BACKENDS names \['quick'\]"):
        backends.choose(problem())


def test_the_table_is_whole():
    """Each device's places differ, so that there is one order; what has no place runs by name only."""
    table = backends.BACKENDS
    for device, where in (("cpu", "on_cpu"), ("cuda", "elsewhere"), ("mps", "elsewhere")):
        places = [getattr(table[name], where) for name in backends.order(device)]
        assert places == sorted(set(places))
        assert all(getattr(table[name], where) is None for name in table.keys() - set(backends.order(device)))
    assert backends.order("cpu") == ("cpu", "eager", "portable")
    assert backends.order("cuda") == ("portable", "eager")


def test_explain(monkeypatch):
    q = torch.empty(1, 2, 4, 300)
    assert tfkern.explain(q, q, q).startswith("cpu (fused whole) runs Problem(batch=1, heads=2")
    assert tfkern.explain(q, q, q, window=(0, 0)).startswith("cpu (fused whole) runs")
    long = torch.empty(1, 2, 1000, 16)
    assert tfkern.explain(long, long, long, window=(9, 9)).startswith("cpu (fused in 16 tiles) runs")
    lengths = torch.full((1,), 9)
    assert tfkern.explain(long, long, long, key_lengths=lengths).startswith("cpu (fused, sequences of equal lengths together)")
    text = tfkern.explain(q, q, q, softcap=2.0)
    assert text.startswith(
        "cpu (in tiles of PyTorch's operations: softcap is nothing that PyTorch's fused CPU attention has) runs"
    )
    monkeypatch.setenv("TFKERN_BACKENDS", "portable,eager")
    text = tfkern.explain(q, q, q)
    assert text.startswith("eager runs")
    assert "portable: head dim 300 is outside 0..256" in text
    assert "no backend can do this problem" in tfkern.explain(q, q, q, backend="portable")


def test_without_triton(python_without):
    code = (
        "import torch, tfkern; q = torch.randn(1, 2, 8, 16, requires_grad=True); "
        "tfkern.attention(q, q, q).sum().backward(); print(tfkern.explain(q, q, q, backend='portable'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(python_without(code, "triton"), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout or "does not import" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


def test_importing_tfkern_imports_no_triton(python_without):
    code = "import tfkern, tfkern.cli; assert not any(m.split('.')[0] == 'triton' for m in sys.modules), 'imported'"
    done = subprocess.run(python_without(code), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
