"""What can't run is deselected and counted, in one process and in several; counts add up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = """
import pytest
@pytest.mark.parametrize("n", range(5))
def test_runs(n): pass
@pytest.mark.gpu
@pytest.mark.parametrize("n", range(4))
def test_gpu(n): pass
@pytest.mark.hopper_gpu
@pytest.mark.parametrize("n", range(3))
def test_hopper(n): pass
@pytest.mark.cpu
@pytest.mark.parametrize("n", range(2))
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
# In the place of torch, which takes seconds to import, on a machine with this GPU or none; and of tfkern, which imports it.
TORCH = """
import sys, unittest.mock
torch = sys.modules["torch"] = unittest.mock.MagicMock()
torch.cuda.is_available.return_value = bool({capability})
torch.cuda.get_device_capability.return_value = {capability}
torch.version.hip = None
sys.modules["tfkern"] = unittest.mock.MagicMock()
"""


NO_GPU = "12 deselected: 4 need a GPU, 3 are slow, 3 need an H100 or H200, 1 need the moon, 1 not asked for"
A100 = "10 deselected: 3 are slow, 3 need an H100 or H200, 2 need a machine without a GPU, 1 need the moon, 1 not asked for"
H100 = "7 deselected: 3 are slow, 2 need a machine without a GPU, 1 need the moon, 1 not asked for"


@pytest.mark.parametrize(
    ("capability", "passed", "counts", "workers"),
    [
        (None, 7, NO_GPU, 0),
        pytest.param(None, 7, NO_GPU, 2, marks=pytest.mark.slow),
        ((8, 0), 9, A100, 0),
        ((9, 0), 12, H100, 2),
    ],
    ids=["no GPU", "no GPU, two workers", "A100", "H100, two workers"],
)
def test_what_is_not_run_is_counted(capability, passed, counts, workers, tmp_path):
    (tmp_path / "torch.py").write_text(TORCH.format(capability=capability))
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_tiny.py").write_text(TESTS)
    command = ["-m", "pytest", "-c", HERE.parent / "pyproject.toml", "--rootdir", tmp_path, "-q", "-n", str(workers)]
    command += ["-m", "not slow", "--deselect", "test_tiny.py::test_runs[0]", tmp_path]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert counts in done.stdout.splitlines(), (done.stdout + done.stderr)[-2000:]
    assert f"{passed} passed" in done.stdout
    assert "skipped" not in done.stdout
    assert passed + int(counts.split()[0]) == 19
