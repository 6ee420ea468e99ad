"""What can't run is deselected and counted, in one process and in several; counts add up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
TESTS = """
import pytest
@pytest.mark.parametrize("n", range(5))
def test_runs(n): pass
@pytest.mark.gpu
@pytest.mark.parametrize("n", range(4))
def test_gpu(n): pass
@pytest.mark.cpu
@pytest.mark.parametrize("n", range(4))
def test_cpu(n): pass
@pytest.mark.slow
@pytest.mark.needs("the moon", False)
def test_both(): pass
@pytest.mark.slow
@pytest.mark.parametrize("n", range(3))
def test_slow(n): pass
@pytest.mark.needs("the earth", True)
def test_met(): pass
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_not_run_is_counted(workers, tmp_path):
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_tiny.py").write_text(TESTS)
    command = ["-m", "pytest", "-c", HERE.parent / "pyproject.toml", "--rootdir", tmp_path, "-q", "-n", str(workers)]
    command += ["-m", "not slow", "--deselect", "test_tiny.py::test_runs[0]", tmp_path]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    other = "a machine without a GPU" if torch.cuda.is_available() else "a GPU"
    line = f"9 deselected: 4 need {other}, 3 are slow, 1 need the moon, 1 not asked for"
    assert line in done.stdout.splitlines(), (done.stdout + done.stderr)[-2000:]
    assert "9 passed" in done.stdout
    assert "skipped" not in done.stdout
