"""The tests of tests/ that take a device, as the cases of a step: pytest collects them, the supervisor says which runs next."""

import os
from collections.abc import Iterator

import pytest

from tfkern.bench.gpu.worker import ROOT, TEXT, Context, Serve

# The kernels that no other machine runs first; small problems of each feature before large ones.
FILES = ("tests/test_hopper.py", "tests/test_hopper_backward.py", "tests/test_small.py", "tests/test_attention.py")
DRY_FILES = ("tests/test_small.py",)
DRY = 30  # without a GPU one test in so many


class Plugin:
    """Serves what was collected in the place of pytest's own loop."""

    def __init__(self, context: Context, serve: Serve):
        self.context, self.serve = context, serve
        self.reports: list[pytest.TestReport] = []
        self.broken: dict[str, str] = {}  # what could not be collected

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken[report.nodeid] = report.longreprtext

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = [item for item in session.items if _on_the_chip(item)]
        if self.context.dry:
            items = items[::DRY]
        cases = [(name, lambda text=text: iter([dict(problem=text[-TEXT:])])) for name, text in self.broken.items()]
        self.serve([*cases, *((item.nodeid, lambda item=item: self._rows(item)) for item in in_turn(items))])
        return True

    def _rows(self, item: pytest.Item) -> Iterator[dict]:
        """Run a test: what pytest reports of its setup, call and teardown, as one row."""
        self.reports.clear()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        row = dict(seconds=round(sum(report.duration for report in self.reports), 2))
        for report in self.reports:
            if report.failed:
                row["problem"] = f"{_line(report)}\n{report.longreprtext[-TEXT:]}"
            elif report.skipped:
                row["skipped"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        yield row


def _line(report: pytest.TestReport) -> str:
    """The error's message in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"{report.when} failed: {crash.message.splitlines()[0] if crash and crash.message else report.nodeid}"


def _on_the_chip(item: pytest.Item) -> bool:
    """Whether a test runs kernels on the device that is there."""
    if getattr(item, "callspec", None) and item.callspec.params.get("backend") in ("cpu", "eager"):
        return False
    return "device" in item.fixturenames or any(item.get_closest_marker(name) for name in ("gpu", "hopper_gpu"))


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """One of each file, then the next of each: when time is up all have had their share."""
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.nodeid.partition("::")[0], []).append(item)
    longest = max(map(len, by_file.values()), default=0)
    return [found[i] for i in range(longest) for found in by_file.values() if i < len(found)]


def run(context: Context, serve: Serve) -> None:
    """The step, as supervisor.Step has it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the tests ask for deterministic algorithms
    files = [str(ROOT / name) for name in (DRY_FILES if context.dry else FILES)]
    options = ["-q", f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "default"]
    code = pytest.main([*options, *files], plugins=[Plugin(context, serve)])
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED):
        raise RuntimeError(f"pytest ended with {code!r}")
