"""The step that runs the tests of tests/ that use a device. pytest collects them, and the supervisor names the next to run."""

import os
from collections.abc import Iterator

import pytest

from tfkern.bench.gpu.worker import ROOT, TEXT, Context, Serve

# In order of value: first kernels that run on no other machine, then small problems of each feature, then large ones.
FILES = ("tests/test_hopper.py", "tests/test_hopper_backward.py", "tests/test_small.py", "tests/test_attention.py")
DRY_FILES = ("tests/test_small.py",)
DRY = 30  # a dry run takes one test in 30


class Plugin:
    """A pytest plugin that serves the collected tests as cases, in place of pytest's own loop."""

    def __init__(self, context: Context, serve: Serve):
        self.context, self.serve = context, serve
        self.reports: list[pytest.TestReport] = []
        self.broken: dict[str, str] = {}  # {name: error} of what could not be collected

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
        """Run a test, and yield one row with the seconds of its setup, call and teardown, and its failure or reason to skip."""
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
    """The phase in which a test failed and the first line of the error's message."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"{report.when} failed: {crash.message.splitlines()[0] if crash and crash.message else report.nodeid}"


def _on_the_chip(item: pytest.Item) -> bool:
    """Whether a test runs kernels on the device: it takes a device or has a GPU marker, and its backend is not cpu or eager."""
    if getattr(item, "callspec", None) and item.callspec.params.get("backend") in ("cpu", "eager"):
        return False
    return "device" in item.fixturenames or any(item.get_closest_marker(name) for name in ("gpu", "hopper_gpu"))


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests with files interleaved: the first test of each file, then the second of each, and so on. So each file has had a
    share when time is up."""
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.nodeid.partition("::")[0], []).append(item)
    longest = max(map(len, by_file.values()), default=0)
    return [found[i] for i in range(longest) for found in by_file.values() if i < len(found)]


def run(context: Context, serve: Serve) -> None:
    """Run the step: the `run` of a supervisor.Step."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the tests ask for deterministic algorithms
    files = [str(ROOT / name) for name in (DRY_FILES if context.dry else FILES)]
    options = ["-q", f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "default"]
    code = pytest.main([*options, *files], plugins=[Plugin(context, serve)])
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED):
        raise RuntimeError(f"pytest ended with {code!r}")
