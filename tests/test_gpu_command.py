"""`make gpu` without a GPU: calls keep their rows, go on where earlier ones stopped, and tell what went wrong; reports are drawn
from rows. Planted faults: test_gpu_faults.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tfkern.bench.gpu import __main__ as gpu
from tfkern.bench.gpu import chip_tests, steps
from tfkern.bench.gpu.rows import current, read
from tfkern.bench.gpu.supervisor import Outcome, Step

pytestmark = pytest.mark.cpu  # on a GPU `make gpu` itself is run

ROOT = Path(__file__).resolve().parent.parent


def command(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "bench/gpu/checkout.py", "-m", "tfkern.bench.gpu", "--out", str(tmp_path), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def rows(tmp_path) -> list[dict]:
    found, torn = read(tmp_path / "dry-run" / "rows.jsonl")
    assert torn == 0
    return found


def test_without_a_gpu_or_a_call_it_says_what_to_do(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2
    assert [line.split()[:3] for line in done.stderr.splitlines()[1:]] == [["make", "gpu", f"CALL={n}"] for n in (1, 2, 3)]
    done = command(tmp_path, "--call", "1")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # CI runs `make gpu ARGS=--dry-run` as well
def test_dry_run_and_again(tmp_path):
    only = ("--dry-run", "--only", "environment", "headline", "memory", "--commit", "0123abc")
    first = command(tmp_path, *only)
    assert first.returncode == 0, first.stdout + first.stderr
    assert [line.split(":")[0] for line in first.stdout.splitlines() if line.startswith("call ")] == [
        "call 1",
        "call 2",
        "call 3",
    ]
    found = rows(tmp_path)
    assert {row["commit"] for row in found} == {"0123abc"}
    timed = [row for row in found if "ms" in row]
    assert {row["provider"] for row in timed} == {"tfkern portable", "sdpa default", "sdpa flash"}
    assert {row["direction"] for row in timed} == {"forward", "backward", "forward+backward"}
    folder = tmp_path / "dry-run"
    (results,) = folder.glob("*.json")
    loaded = json.loads(results.read_text())
    assert (loaded["machine"]["torch"], loaded["machine"]["commit"]) == (torch.__version__, "0123abc")
    assert loaded["rows"] == current(found)
    assert results.with_suffix(".csv").read_text().count("\n") > len(timed)
    files = list(tmp_path.rglob("*.*"))
    assert len(files) <= 8
    assert all(len(file.relative_to(tmp_path).parts) <= 3 and set(file.name) <= gpu.IN_NAMES for file in files)
    again = command(tmp_path, *only)
    assert again.returncode == 0
    more = rows(tmp_path)[len(found) :]
    assert {row["step"] for row in more if row["case"] != "start"} == {"environment"}  # nothing else was done twice


def test_rows_begin_with_those_that_are_committed(tmp_path, monkeypatch):
    """Into an empty folder; --fresh forgets them; a dry run has none."""
    monkeypatch.setattr(gpu, "COMMITTED", tmp_path / "committed")
    there = gpu.open_rows(arguments(monkeypatch, "--out", str(tmp_path / "committed")), "NVIDIA H100 80GB HBM3")
    there.append(dict(step="a", case="b"))
    there.close()
    assert there.path == tmp_path / "committed" / "h100-80gb-hbm3" / "rows.jsonl"
    out = "--out", str(tmp_path / "out")
    for more, count in (((), 1), (("--fresh",), 0), ((), 0), (("--dry-run",), 0)):
        opened = gpu.open_rows(arguments(monkeypatch, *out, *more), "NVIDIA H100 80GB HBM3")
        assert len(opened.rows) == count
        opened.close()


def arguments(monkeypatch, *given: str):
    monkeypatch.setattr(sys, "argv", ["gpu", *given])
    return gpu.arguments()


def test_a_folder_of_any_card_has_a_name_that_travels(tmp_path, monkeypatch):
    opened = gpu.open_rows(arguments(monkeypatch, "--out", str(tmp_path)), "NVIDIA RTX(TM) 6000/Ada")
    opened.close()
    assert set(opened.path.parent.name) <= gpu.IN_NAMES


@pytest.mark.parametrize("budget", [None, 60])
def test_each_step_has_its_share_of_what_is_left(budget, tmp_path, monkeypatch):
    """In a call of steps that take no time, the last has all of it; none is beyond the call's end."""
    shares = {}
    monkeypatch.setattr(gpu.Supervisor, "run", lambda self, step, seconds: shares.setdefault(step.name, seconds) and Outcome())
    given = arguments(monkeypatch, "--dry-run", "--out", str(tmp_path), *(["--budget", "60"] if budget else []))
    given.began = time.time() - 10
    opened = gpu.open_rows(given, "cpu")
    unfinished = gpu.run(1, given, opened, {}, lambda: False)
    opened.close()
    left = (budget or gpu.DRY_BUDGET) - 10 - gpu.REPORTING
    found = gpu.CALLS[1][1]
    assert list(shares) == [step.name for step in found]
    assert shares[found[0].name] == pytest.approx(left * found[0].seconds / sum(step.seconds for step in found), rel=0.05)
    assert unfinished == [step.name for step in found]  # none has told of a case
    assert shares[found[-1].name] == pytest.approx(left, rel=0.05)


def test_the_shares_of_each_call_fit_its_time():
    for seconds, found in gpu.CALLS.values():
        assert sum(step.seconds for step in found) <= seconds - gpu.REPORTING
        assert all(isinstance(step, Step) for step in found)
        assert len({step.name for step in found}) == len(found)


ON_A_GPU = """
import sys, types
import torch
def get_device_properties(device):
    if torch.device(device).type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = get_device_properties
from tfkern.bench.gpu import chip_tests, worker
def serve(cases):
    for name, _ in cases:
        print("case", name)
chip_tests.run(worker.Context(torch.device("cuda"), False, 1e12), serve)
"""


@pytest.mark.slow
def test_what_runs_on_the_chip():
    """Collected as where there is an H100, though nothing could run: all files, no test of what needs no kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-P", "-c", ON_A_GPU], capture_output=True, text=True, env=environment, check=False)
    names = [line.removeprefix("case ").partition("[")[0] for line in done.stdout.splitlines() if line.startswith("case ")]
    assert all("::" in name for name in names), done.stdout[-3000:]  # a file by itself is one that can't be imported
    assert {name.partition("::")[0] for name in names} == set(chip_tests.FILES)
    assert names.count("tests/test_hopper.py::test_on_the_chip") >= 200
    assert names.count("tests/test_hopper_backward.py::test_in_one_launch_on_the_chip") >= 40
    assert names.count("tests/test_attention.py::test_case") >= 250
    assert "eager" not in done.stdout
    assert len({name.partition("::")[0] for name in names[:4]}) == 4  # each file has its share of the time


TESTS = """
import pytest

@pytest.fixture
def device():
    return "cuda"

@pytest.fixture
def broken(device):
    raise RuntimeError("CUDA error: misaligned address")

def test_passes(device): pass
def test_fails(device): assert device == "cpu", "it is another"
def test_skips(device): pytest.skip("not on this card")
def test_errs(broken): pass
def test_of_no_device(): pass
"""


@pytest.mark.slow
def test_tests_become_rows(tmp_path):
    """Each with its report; a file that can't be imported is a problem, and keeps no other from its tests."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_none.py").write_text("import nothing_of_that_name")
    script = f"""
import json
from pathlib import Path
import torch
from tfkern.bench.gpu import chip_tests, worker
chip_tests.ROOT = Path({str(tmp_path)!r})
chip_tests.FILES = ["test_some.py", "test_none.py"]
def serve(cases):
    Path({str(tmp_path / "found.json")!r}).write_text(json.dumps([(name, list(rows())) for name, rows in cases]))
chip_tests.run(worker.Context(torch.device("cpu"), False, 1e12), serve)
"""
    subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    found = dict(json.loads((tmp_path / "found.json").read_text()))
    assert {name for name, (row,) in found.items() if not row.get("problem")} == {
        f"test_some.py::test_{n}" for n in ("passes", "skips")
    }
    assert found["test_some.py::test_skips"][0]["skipped"] == "Skipped: not on this card"
    said = {name: row["problem"] for name, (row,) in found.items() if row.get("problem")}
    assert said["test_some.py::test_fails"].startswith("call failed: AssertionError: it is another")
    assert said["test_some.py::test_errs"].startswith("setup failed: RuntimeError: CUDA error: misaligned address")
    assert "nothing_of_that_name" in said["test_none.py"]
    assert len(found) == 5


def test_wrong_results_are_a_problem(tmp_path, monkeypatch):
    from tfkern.bench import providers

    monkeypatch.setitem(providers.PROVIDERS, "tfkern wrong", lambda shape, dtype, device: lambda q, k, v: q + k + v)
    context = steps.Context(torch.device("cpu"), True, 1e12)
    found = {case: list(make()) for case, make in steps.attention(context, ("tfkern wrong",))}
    assert len(found) == 2
    assert all(row["problem"].startswith("wrong results") for rows in found.values() for row in rows)
    assert not any("ms" in row for rows in found.values() for row in rows)
