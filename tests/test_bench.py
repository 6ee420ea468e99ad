"""The benchmark's machinery: nothing wrong is timed, nobody is left out in silence, results can be drawn again."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch

import tfkern
from tfkern import cli, reference
from tfkern.bench import candidates, plots, providers, runner
from tfkern.bench.shapes import Shape

TINY = Shape("tiny", 2, 3, 40, 16, is_causal=True)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(runner, "CPU_SHAPES", [TINY])
    monkeypatch.setattr(runner, "GPU_SHAPES", [TINY])


def test_rows(tiny, device):
    rows = list(runner.run(torch.float32, torch.device(device), seconds=0.01))
    assert {row["provider"] for row in rows} == set(providers.PROVIDERS)
    timed = [row for row in rows if "ms" in row]
    assert {row["provider"] for row in timed} >= {"tfkern eager", "sdpa default", "sdpa math", "naive"}
    assert all(row["p20"] <= row["ms"] <= row["p80"] for row in timed)
    assert all(row.get("skipped") for row in rows if "ms" not in row)


def test_wrong_results_are_not_timed(tiny, monkeypatch, device):
    def off_by_a_mask(shape, dtype, device):
        return lambda q, k, v: reference.attention(q, k, v, is_causal=False)

    monkeypatch.setitem(providers.PROVIDERS, "wrong", off_by_a_mask)
    (row,) = runner.run(torch.float32, torch.device(device), seconds=0.01, providers=["wrong"])
    assert row["skipped"].startswith("wrong results: out: error")


def test_a_provider_that_fails_is_a_row(tiny, monkeypatch, device):
    def out_of_memory(q, k, v):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(providers.PROVIDERS, "failing", lambda shape, dtype, device: out_of_memory)
    (row,) = runner.run(torch.float32, torch.device(device), seconds=0.01, providers=["failing"])
    assert row["skipped"] == "failed: out of memory"


def test_command_writes_results_and_a_plot(tiny, tmp_path, capsys):
    assert cli.main(["bench", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    loaded = json.loads((tmp_path / "results.json").read_text())
    assert loaded["machine"]["torch"] == torch.__version__
    assert (tmp_path / "results.png").stat().st_size > 1000
    plots.draw(tmp_path / "results.json", tmp_path / "again.png")
    assert (tmp_path / "again.png").exists()


def test_flops_and_bytes():
    full = Shape("full", 2, 3, 10, 8)
    assert full.flops("forward") == 4 * 2 * 3 * 10 * 10 * 8
    assert full.flops("forward+backward") == full.flops("forward") + full.flops("backward") == 3.5 * full.flops("forward")
    assert Shape("half", 2, 3, 10, 8, is_causal=True).flops("forward") == full.flops("forward") / 2
    assert full.bytes("forward", itemsize=2) == 4 * 2 * 3 * 10 * 8 * 2
    assert full.exps("forward+backward") == 2 * full.exps("forward") == 2 * 2 * 3 * 10 * 10


def test_inputs_are_views_of_a_packed_projection():
    q, k, v, do = TINY.inputs(torch.float32, "cpu")
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.shape == k.shape == v.shape == do.shape == (2, 3, 40, 16)


def test_flash_attn_packages_get_their_layout(monkeypatch):
    """(B, N, H, D) and `causal`, and of (out, lse) the first; on a stand-in for a package and a GPU."""

    def flash_attn_func(q, k, v, causal):
        out = tfkern.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, backend="eager")
        return out.transpose(1, 2), None

    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v = torch.randn(3, 2, 3, 40, 16)
    run = providers.PROVIDERS["flash-attn 3"](TINY, torch.float32, types.SimpleNamespace(type="cuda"))
    torch.testing.assert_close(run(q, k, v), tfkern.attention(q, k, v, is_causal=True))
    with pytest.raises(providers.UnavailableError, match="does not import"):
        providers.PROVIDERS["flash-attn 4"](TINY, torch.float32, types.SimpleNamespace(type="cuda"))


@pytest.mark.slow
def test_what_is_tuned_gets_as_far_as_the_launch():
    """On a GPU that is not there. A candidate that fails is passed over, which must not hide that all do."""
    script = """
import torch
from tfkern.bench import candidates, tuning
for cases, time in ((tuning.hopper_cases, tuning.time_hopper), (tuning.cases, tuning.time_one)):
    for case, config in cases(first_only=True):
        for row in time(case, config, torch.device("cpu"), True):
            print(row["kernel"], row.get("skipped", "launched"))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, env=environment, check=False)
    kernels = [*candidates.HOPPER, "flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"]
    assert done.stdout.splitlines() == [f"{kernel} launched" for kernel in kernels], done.stdout + done.stderr[-2000:]
