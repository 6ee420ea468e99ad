"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported. And: what can't
run here is deselected, and counted in one line at the end."""

import os
import sys
from collections import Counter

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

import tfkern  # noqa: E402, F401  # else bench's files that need no torch would put a stand-in into its place

torch.set_num_threads(int(os.environ.get("TFKERN_TEST_THREADS", "1")))  # xdist runs one worker a core

# marker: (what its tests need, whether it is here)
HOPPER = DEVICE == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
NEEDS = {
    "hopper_gpu": ("an H100 or H200", HOPPER),
    "gpu": ("a GPU", DEVICE == "cuda"),
    "cpu": ("a machine without a GPU", DEVICE == "cpu"),
}
DESELECTED = pytest.StashKey[Counter]()


def missing(item) -> str | None:
    """What a test needs that is not here."""
    own = [NEEDS[name] for name in NEEDS if item.get_closest_marker(name)]
    own += [mark.args for mark in item.iter_markers("needs")]
    if getattr(item, "callspec", None) and item.callspec.params.get("backend") == "cpu":
        own.append(NEEDS["cpu"])
    return next((what for what, here in own if not here), None)


def pytest_configure(config):
    config.stash[DESELECTED] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if unable := [item for item in items if missing(item)]:
        items[:] = [item for item in items if not missing(item)]
        config.hook.pytest_deselected(items=unable)


def pytest_deselected(items):
    for item in items:
        reason = (
            f"need {what}" if (what := missing(item)) else "are slow" if item.get_closest_marker("slow") else "not asked for"
        )
        item.config.stash[DESELECTED][reason] += 1


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = dict(session.config.stash[DESELECTED])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A worker of xdist is done. Each has collected everything; one that crashed tells nothing."""
    if told := getattr(node, "workeroutput", {}).get("deselected"):
        node.config.stash[DESELECTED] = Counter(told)


def pytest_terminal_summary(terminalreporter, config):
    if counts := config.stash[DESELECTED]:
        each = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        terminalreporter.write_line(f"{counts.total()} deselected: {each}")


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
