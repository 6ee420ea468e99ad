"""`make gpu` with planted faults: a step whose cases go wrong, each in its way, in a first call and not in a second.

usage: python tests/rehearsal.py  # prints the table
"""

import ctypes
import functools
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tfkern.bench.gpu.rows import RowFile, tries
from tfkern.bench.gpu.supervisor import Step, Supervisor
from tfkern.bench.gpu.worker import plain

QUIET = 2.0  # seconds of the watchdog
_broken = False  # in a process: whether a sticky error has come


def _sticky() -> Iterator[dict]:
    global _broken  # noqa: PLW0603 (as CUDA's error is one of the whole process)
    _broken = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA` …")


def _sticky_passed_over() -> Iterator[dict]:
    """As a case does that takes any error of a peer for a reason to leave it out."""
    try:
        yield from _sticky()
    except RuntimeError as error:
        yield dict(skipped=f"failed: {str(error).splitlines()[0]}")


def _hang() -> Iterator[dict]:
    yield dict(half=1)
    time.sleep(1000)


def _too_large() -> Iterator[dict]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 GiB. GPU 0 has a total capacity of 79.18 GiB")


def _killed() -> Iterator[dict]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield {}


def _crashed() -> Iterator[dict]:
    yield dict(read=ctypes.string_at(0))


def _compiled(ptxas: str) -> Iterator[dict]:
    """A kernel for a GPU that is not there, with ptxas replaced by a script."""
    from tfkern.bench import fake_gpu

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        script = Path(folder) / "ptxas"
        script.write_text(f"#!/bin/sh\n{ptxas}\n")
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        os.environ["TRITON_PTXAS_PATH"] = str(script)
        fake_gpu.pretend()
        import tfkern

        tfkern.attention(*torch.zeros(3, 1, 1, 16, 16, dtype=torch.bfloat16))
    yield dict(compiled=True)


def _ptxas() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")


def _compiler_fails() -> Iterator[dict]:
    return _compiled('case "$1" in --version) exec ' + _ptxas() + ' --version;; esac; echo "ptxas: no" >&2; exit 1')


def _compiler_is_slow() -> Iterator[dict]:
    return _compiled(f"sleep {1.5 * QUIET}; exec {_ptxas()} $*")


FAULTS: dict[str, Callable[[], Iterator[dict]]] = {
    "CUDA error": _sticky,
    "CUDA error, passed over": _sticky_passed_over,
    "hang": _hang,
    "out of memory": _too_large,
    "compiler fails": _compiler_fails,
    "killed": _killed,
    "crash": _crashed,
    "slow compiler": _compiler_is_slow,  # no fault: the watchdog must not take it for one
}


def cases(planted: str, context) -> Iterator:
    """A case for each fault, which is there as long as the file `planted` is, and behind each one without."""

    def good() -> Iterator[dict]:
        if _broken:
            yield from _sticky()
        yield dict(figure=1.0)

    for fault, rows in FAULTS.items():
        yield fault, rows if Path(planted).exists() else good
        yield f"behind {fault}", good


# Steps of other kinds, for tests.


def no_cases(context, serve):
    raise ImportError("a package is missing")


def one_name(context):
    yield "same", lambda: iter([])
    yield "same", lambda: iter([])


def three(context):
    for name in "abc":
        yield name, lambda: iter([dict(process=os.getpid())])


def slow(context):
    for name in ("long", "short"):
        yield name, lambda name=name: (dict(slept=time.sleep(20 if name == "long" else 0)) for _ in range(1))


def half_fall(context):
    for n in range(6):
        yield str(n), lambda n=n: iter([dict(process=os.getpid(), gone=n % 2 or os.kill(os.getpid(), signal.SIGKILL))])


def call(folder: Path) -> list[dict]:
    """One call: the rows that it has written."""
    rows = RowFile(folder / "rows.jsonl")
    before = len(rows.rows)
    supervisor = Supervisor(rows, dry=True)
    supervisor.slow = 1.0
    run = functools.partial(plain, functools.partial(cases, str(folder / "planted")))
    supervisor.run(Step("planted", run, 120, quiet=QUIET, fake=True), 120)
    rows.close()
    return rows.rows[before:]


def rehearse(folder: Path) -> tuple[list[dict], list[dict]]:
    """The rows of a call with the faults, and of one without."""
    (folder / "planted").touch()
    first = call(folder)
    (folder / "planted").unlink()
    return first, call(folder)


def told(rows: list[dict], case: str) -> str:
    """A case's last try in a few words."""
    last = tries(rows).get(("planted", case))
    if last is None:
        return "is not run again"
    text = [f"{key}: {str(value).splitlines()[0]}" for row in last.rows for key, value in row.items() if _says(key, value)]
    return f"{', '.join(text)}{'' if last.ended else '; not ended'}"


def _says(key: str, value) -> bool:
    return key not in ("step", "case", "where") and value is not None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = rehearse(Path(folder))
    print("| fault | its rows in the first call | the case behind it | second call, without the fault |")
    print("| --- | --- | --- | --- |")
    for fault in FAULTS:
        print(f"| {fault} | {told(first, fault)} | {told(first, f'behind {fault}')} | {told(second, fault)} |")


if __name__ == "__main__":
    sys.exit(main())
