"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

torch.set_num_threads(1)  # xdist runs one worker a core


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Every torch.empty is filled with NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")  # there the oracle has sums of any order
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def python_without():
    """A command that runs Python code with the named modules impossible to import."""

    def command(code: str, *modules: str) -> list[str]:
        blocked = "".join(f"sys.modules[{name!r}] = None; " for name in modules)
        return [sys.executable, "-I", "-c", f"import sys; {blocked}{code}"]

    return command


def pytest_addoption(parser):
    parser.addoption("--problems", type=int, default=15, help="how many random problems test_random.py draws")
