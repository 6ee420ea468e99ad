"""`make gpu` when something goes wrong: each planted fault leaves the right rows, and a second call tries again (rehearsal.py)."""

import functools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfkern.bench import faults
from tfkern.bench.gpu import worker
from tfkern.bench.gpu.rows import RowFile, current, problems, read, tries
from tfkern.bench.gpu.supervisor import START, Process, Step, Supervisor
from tfkern.bench.gpu.worker import plain

sys.path.append(str(Path(__file__).resolve().parent))
import rehearsal

pytestmark = [pytest.mark.cpu, pytest.mark.slow]  # on a GPU `make gpu` itself is run

# The problem's first line that a fault leaves, or None; what else its rows say.
WANTED = {
    "CUDA error": ("RuntimeError: CUDA error: an illegal memory access was encountered", {}),
    "CUDA error, passed over": ("failed: CUDA error: an illegal memory access was encountered", {}),
    "hang": ("hung: no row in 2 s: SIGKILL", dict(half=1)),
    "out of memory": (None, dict(skipped="OutOfMemoryError: CUDA out of memory")),
    "compiler fails": ("PTXASError: ", {}),
    "killed": ("the process ended: SIGKILL", {}),
    "crash": ("the process ended: SIGSEGV", {}),
    "slow compiler": (None, dict(compiled=True)),
}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    return rehearsal.rehearse(tmp_path_factory.mktemp("rehearsal"))


def test_order(rehearsed):
    """All cases are tried once; in a second call those that failed, and nothing else."""
    first, second = ([row["case"] for row in rows if "began" in row] for rows in rehearsed)
    assert first == [START, *(name for fault in rehearsal.FAULTS for name in (fault, f"behind {fault}"))]
    assert second == [START, *(fault for fault in rehearsal.FAULTS if WANTED[fault][0])]


@pytest.mark.parametrize("fault", rehearsal.FAULTS)
def test_fault(fault, rehearsed):
    problem, more = WANTED[fault]
    first, second = rehearsed
    found = {case: last for (_, case), last in tries(first).items()}
    assert found[f"behind {fault}"].done, "the step did not go on behind the fault"
    assert [row["figure"] for row in found[f"behind {fault}"].rows] == [1.0]
    said = {key: value for row in found[fault].rows for key, value in row.items() if value is not None}
    for key, value in more.items():
        assert str(said[key]).startswith(str(value))
    assert found[fault].done == (problem is None)
    assert said.get("problem", "").startswith(problem or "")
    assert sum(line.startswith(f"planted {fault}: ") for line in problems(first)) == (problem is not None)
    assert problems([*first, *second]) == []  # the second try counts


def test_a_hang_and_a_crash_say_where(rehearsed):
    said = {row["case"]: row["problem"] for row in rehearsed[0] if row.get("problem")}
    assert "in _hang" in said["hang"]
    assert "in _crashed" in said["crash"]
    assert not any(str(worker.ROOT) in text for text in said.values())


def supervised(tmp_path, run, seconds=60.0, dry=True, **options) -> tuple[RowFile, object]:
    rows = RowFile(tmp_path / "rows.jsonl")
    supervisor = Supervisor(rows, dry)
    supervisor.slow = 1.0
    outcome = supervisor.run(Step("step", run, seconds, **{"quiet": 30, **options}), seconds)
    rows.close()
    return rows, outcome


def test_a_step_that_cannot_name_its_cases(tmp_path):
    for run, wrong in (
        (rehearsal.no_cases, "a package is missing"),
        (functools.partial(plain, rehearsal.one_name), "two cases have one name"),
    ):
        rows, outcome = supervised(tmp_path, run)
        (problem,) = (row["problem"] for row in current(rows.rows))
        assert "the process ended: exit 1" in problem
        assert wrong in problem
        assert (outcome.cases, outcome.done, outcome.problems) == (0, 0, 1)
    rows, outcome = supervised(tmp_path, functools.partial(plain, rehearsal.three))  # and later can
    assert problems(rows.rows) == []
    assert (outcome.cases, outcome.done) == (3, 3)


def test_a_lost_gpu_is_not_replaced_by_the_cpu(tmp_path):
    rows, outcome = supervised(tmp_path, functools.partial(plain, rehearsal.three), dry=False)
    (problem,) = (row["problem"] for row in current(rows.rows))
    assert "the GPU is not there any more" in problem
    assert outcome.done == 0


def test_each_in_a_process_of_its_own(tmp_path):
    together, alone = (
        {
            row["process"]
            for row in current(
                supervised(tmp_path / str(alone), functools.partial(plain, rehearsal.three), alone=alone)[0].rows
            )
        }
        for alone in (False, True)
    )
    assert len(together) == 1
    assert len(alone) == 3


def test_a_case_is_cut_when_time_is_up_and_comes_last_in_the_next_call(tmp_path):
    run = functools.partial(plain, rehearsal.slow)
    rows, outcome = supervised(tmp_path, run, seconds=4)
    assert outcome.seconds < 8
    assert (outcome.cases, outcome.done, outcome.problems) == (2, 0, 0)
    assert [row["cut"].splitlines()[0] for row in rows.rows if "cut" in row] == ["the time of the step was up: SIGKILL"]
    rows, outcome = supervised(tmp_path, run, seconds=4)
    assert [row["case"] for row in rows.rows if "began" in row] == [START, "long", START, "short", "long"]
    assert outcome.done == 1


def test_processes_share_cases_and_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rows, outcome = supervised(tmp_path, functools.partial(plain, rehearsal.half_fall), workers=2)
    assert (outcome.cases, outcome.done, outcome.problems) == (6, 3, 3)
    assert len({row["process"] for row in rows.rows if "process" in row}) >= 2
    assert all(row["problem"].startswith("the process ended: SIGKILL") for row in rows.rows if "problem" in row)


def test_the_run_can_be_ended(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    began = time.monotonic()
    cut = lambda: time.monotonic() - began > 5  # noqa: E731
    Supervisor(rows, True, cut).run(Step("step", functools.partial(plain, rehearsal.slow), 60), 60)
    rows.close()
    assert time.monotonic() - began < 10
    assert [row["cut"].splitlines()[0] for row in rows.rows if "cut" in row] == ["the run was ended: SIGKILL"]


def test_compiling_has_a_bound_of_its_own():
    process = Process.__new__(Process)
    process.step, process.named, process.since = Step("step", None, 60), True, time.monotonic() - 20
    process.compiling = True
    assert process.overdue(1.0) is None
    process.compiling = False
    assert process.overdue(1.0) == "hung: no row in 15 s"
    process.compiling, process.since = True, time.monotonic() - 100
    assert process.overdue(1.0) == "hung: one kernel was not compiled in 90 s"


def test_what_breaks_a_process():
    sticky = [
        "AcceleratorError: CUDA error: an illegal memory access was encountered", "RuntimeError: CUDA driver error: unknown",
        "RuntimeError: Triton Error [CUDA]: misaligned address", "cudaErrorLaunchFailure", "CUDA error: device-side assert triggered",
        "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", "unspecified launch failure",
        "CUDA error: operation not permitted when stream is capturing",
    ]  # fmt: skip
    memory = [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "RuntimeError: CUDA error: out of memory", "MemoryError: ",
        "RuntimeError: Triton Error [CUDA]: out of memory",
    ]  # fmt: skip
    harmless = [
        "No available kernel. Aborting execution.", "OutOfResources: out of resource: shared memory, Required: 294912",
        "runs on CUDA and ROCm devices, not on cpu", "wrong results: dq: error 1", "the package flash_attn does not import",
    ]  # fmt: skip
    assert [text for text in sticky if not faults.is_sticky(text)] == []
    assert [text for text in memory + harmless if faults.is_sticky(text)] == []
    assert [text for text in memory if not faults.is_out_of_memory(text)] == []


def test_a_torn_line_is_dropped_and_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": "a", "case": "b"}\n{"step": "a", "ca')
    rows = RowFile(path)
    assert (rows.rows, rows.torn) == ([dict(step="a", case="b")], 1)
    rows.append(dict(step="c"))
    rows.close()
    assert read(path) == ([dict(step="a", case="b"), dict(step="c")], 0)


def test_a_row_that_does_not_fit_leaves_the_file_whole(tmp_path):
    """On a file that may not grow further, as on a full disk: the system writes as much as fits, and an error."""
    script = f"""
import resource, sys
from pathlib import Path
from tfkern.bench.gpu.rows import RowFile, RowsError
rows = RowFile(Path({str(tmp_path / "rows.jsonl")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for n in range(100):
        rows.append(dict(step="s", case=str(n)))
except RowsError as error:
    print(n, error)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    count, message = done.stdout.split(" ", 1)
    rows, torn = read(tmp_path / "rows.jsonl")
    assert torn == 0
    assert [row["case"] for row in rows] == [str(n) for n in range(int(count))]
    assert 900 < (tmp_path / "rows.jsonl").stat().st_size <= 1000
    assert message.startswith("rows can't be written to")


def command(tmp_path, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", "tfkern.bench.gpu", "--dry-run", "--out", str(tmp_path), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def test_a_full_disk_ends_the_run(tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (700, 700))
    process = command(tmp_path, "--call", "1", "--only", "environment", preexec_fn=limit)
    said = process.communicate()[0]
    assert process.returncode == 3, said
    assert f"ENDED rows can't be written to {tmp_path / 'dry-run' / 'rows.jsonl'}" in said
    assert "no report" in said
    rows, torn = read(tmp_path / "dry-run" / "rows.jsonl")
    assert torn == 0
    assert len(rows) > 1
    assert [path.name for path in (tmp_path / "dry-run").iterdir()] == ["rows.jsonl"]  # no half of a report


def test_a_signal_ends_the_run_with_a_report(tmp_path):
    process = command(tmp_path, "--call", "1", "--only", "features")
    path = tmp_path / "dry-run" / "rows.jsonl"
    while process.poll() is None and not any("began" in row and row["case"] != START for row in read(path)[0]):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert any(row.get("cut", "").startswith("the run was ended") for row in read(path)[0])
    assert len(list((tmp_path / "dry-run").glob("*.json"))) == 1
