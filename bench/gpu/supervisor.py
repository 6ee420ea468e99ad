"""Runs the cases of a step in processes of their own, writes the rows of each as they come, and goes on behind a case that ends
its process: by an error of CUDA, a crash, or a watchdog.

A case has `quiet` seconds from one row to the next; time in Triton's compiler has a bound of its own. What failed, hung or was
cut off is not done: a later call tries it again, behind all that was not tried.
"""

import contextlib
import datetime
import multiprocessing
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from tfkern.bench.gpu import worker
from tfkern.bench.gpu.rows import RowFile, first_line, tries

STARTING = 90.0  # seconds that a process may take to import, collect and name its cases
COMPILING = 90.0  # seconds that one kernel may take to compile
GOING = 2.0  # seconds that a process may take to go
STACK = 0.2  # seconds that it gets to write where it stands
TICK = 0.5  # seconds at most between two looks at the watchdog
START = "start"  # the case that stands for the time until a step's cases are named


@dataclass(frozen=True)
class Step:
    """What to run, and how: `seconds` weighs it against the steps of its call; `alone`: each case in a process of its own;
    `always`: in every call, whatever earlier ones have written; `fake`: without a GPU kernels are compiled for one that is not
    there, not interpreted."""

    name: str
    run: Callable[[worker.Context, worker.Serve], None]
    seconds: float
    workers: int = 1
    quiet: float = 15.0
    alone: bool = False
    always: bool = False
    fake: bool = False


@dataclass
class Outcome:
    """What became of a step's cases."""

    cases: int = 0
    done: int = 0  # by this call or an earlier one
    problems: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        wrong = f", {self.problems} with problems" if self.problems else ""
        return f"{self.done} of {self.cases} cases{wrong}, {self.seconds:.0f} s"


class Process:
    """One process of a step, the case that it runs, and since when nothing came from it."""

    def __init__(self, step: Step, dry: bool, deadline: float, folder: str):
        context = multiprocessing.get_context("forkserver")  # torch is imported once, CUDA by each
        context.set_forkserver_preload(["torch"])
        self.step, self.case, self.named, self.compiling = step, None, False, False
        self.connection, theirs = context.Pipe()
        descriptor, self.log = tempfile.mkstemp(dir=folder)
        os.close(descriptor)
        arguments = (theirs, step.run, dry, dry and not step.fake, deadline, self.log)
        self.process = context.Process(target=worker.main, args=arguments)
        self.process.start()
        theirs.close()
        self.since = time.monotonic()

    def give(self, case: str | None) -> None:
        """The next case, or None: it may go."""
        self.case, self.since, self.compiling = case, time.monotonic(), False
        with contextlib.suppress(OSError):  # it is gone; that is noticed where it is listened to
            self.connection.send(case)

    def overdue(self, slow: float) -> str | None:
        """Why it has to end, if it has, on a machine that is so many times slower than a GPU."""
        limit, what = self.step.quiet * slow, "no row"
        if not self.named:
            limit, what = STARTING, "no list of cases"
        elif self.compiling:
            limit, what = COMPILING, "one kernel was not compiled"
        silent = time.monotonic() - self.since
        return f"hung: {what} in {limit:.0f} s" if silent > limit else None

    def signal(self, number: signal.Signals) -> None:
        """SIGUSR1: it writes where it stands into its log. SIGKILL ends also what it has started."""
        with contextlib.suppress(OSError):
            (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)

    def end(self, patience: float = 0.0, killed: float = 5.0) -> str:
        """Kill it if it does not end by itself, and wait a while, since the GPU may hold it; how it ended and the last that it
        printed."""
        self.process.join(patience)
        self.signal(signal.SIGKILL)
        self.process.kill()
        self.process.join(killed)
        self.connection.close()
        code = self.process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"
        printed = Path(self.log).read_text(errors="replace").replace(f"{worker.ROOT}/", "").strip()
        return f"{how}\n{printed[-worker.TEXT :]}"


class Supervisor:
    """Runs steps, one after the other, into one file of rows; `about` goes into each row, `cut` says when it is enough."""

    def __init__(self, rows: RowFile, dry: bool, cut: Callable[[], bool] = lambda: False, about: dict | None = None):
        self.rows, self.dry, self.cut, self.about = rows, dry, cut, about or {}
        self.slow = 8.0 if dry else 1.0

    def run(self, step: Step, seconds: float) -> Outcome:
        """All cases of a step that are not done, for so long, or until `cut`."""
        start = time.monotonic()
        self.step, self.until = step, start + seconds
        self.names: list[str] = []
        self.queue: deque[str] | None = None  # until a process has named them
        self.crew: list[Process] = []
        self.startable = True
        self._write(START, dict(began=_now()))
        with tempfile.TemporaryDirectory(prefix="tfkern-") as self.folder:
            try:
                for _ in range(min(step.workers, os.cpu_count() or 1)):
                    self._start()
                self._listen()
            finally:
                for process in self.crew:
                    process.end()
        return self._outcome(time.monotonic() - start)

    def _listen(self) -> None:
        while self.crew:
            patience = min(TICK, self.until - time.monotonic())
            if patience <= 0 or self.cut():
                return self._stop("the time of the step was up" if patience <= 0 else "the run was ended")
            by = {end: process for process in self.crew for end in (process.connection, process.process.sentinel)}
            for process in dict.fromkeys(by[end] for end in wait(list(by), patience)):
                self._hear(process)
            for process in list(self.crew):
                if reason := process.overdue(self.slow):
                    process.signal(signal.SIGUSR1)
                    time.sleep(STACK)
                    self._lost(process, reason, 0.0)

    def _hear(self, process: Process) -> None:
        """The next that a process says; if it says nothing any more, it is lost."""
        try:
            if not process.connection.poll():
                raise EOFError
            kind, what = process.connection.recv()
        except (EOFError, OSError):
            self._lost(process, "the process ended", GOING)
            return
        process.since = time.monotonic()
        if kind == "row":
            self._write(process.case, what)
        elif kind == "compiling":
            process.compiling = what
        elif kind == "cases":
            process.named = True
            if self.queue is None:
                self._plan(what)
            self._next(process)
        elif kind == "ended":
            self._write(process.case, dict(ended=_now()))
            process.case = None
            if what and not self.step.alone:
                self._next(process)
            else:
                process.give(None)
                process.end(GOING)
                self._replace(process)

    def _plan(self, names: list[str]) -> None:
        """What is to be done: what was not tried yet, then what was and failed."""
        self._write(START, dict(ended=_now()))
        self.names = names
        before = {} if self.step.always else tries(self.rows.rows)
        last = {case: found for (step, case), found in before.items() if step == self.step.name}
        again = [case for case, found in last.items() if case in names and not found.done]
        self.queue = deque([*(name for name in names if name not in last), *again])

    def _start(self) -> None:
        self.crew.append(Process(self.step, self.dry, self.until, self.folder))

    def _next(self, process: Process) -> None:
        """Give a process its next case, or let it go."""
        if self.queue:
            self._write(case := self.queue.popleft(), dict(began=_now()))
            process.give(case)
        else:
            process.give(None)
            process.end(GOING)
            self.crew.remove(process)

    def _replace(self, process: Process) -> None:
        """Another process goes on in its place, if there is something to go on with."""
        self.crew.remove(process)
        if self.queue and self.startable:
            self._start()

    def _lost(self, process: Process, reason: str, patience: float) -> None:
        """A process that hung or ended within a case, or before it could name its cases."""
        how = process.end(patience)
        self.startable &= process.named  # the next could not name its cases either
        self._write(process.case or START, dict(problem=f"{reason}: {how}"))
        self._replace(process)

    def _stop(self, reason: str) -> None:
        """End all processes; the cases that they were in are not done."""
        for number, wait_for in ((signal.SIGUSR1, STACK), (signal.SIGKILL, 0.0)):
            for process in self.crew:
                process.signal(number)
            time.sleep(wait_for)
        by = time.monotonic() + 5.0  # for all together
        while self.crew:
            process = self.crew.pop()
            how = process.end(0.0, max(0.0, by - time.monotonic()))
            if process.case:
                self._write(process.case, dict(cut=f"{reason}: {how}"))

    def _write(self, case: str, row: dict) -> None:
        self.rows.append(dict(step=self.step.name, case=case) | self.about | row)
        if row.get("problem"):
            print(f"PROBLEM {self.step.name} {case}: {first_line(row['problem'])}", flush=True)

    def _outcome(self, seconds: float) -> Outcome:
        found = {case: t for (step, case), t in tries(self.rows.rows).items() if step == self.step.name}
        wrong = sum(any(row.get("problem") for row in t.rows) for t in found.values())
        return Outcome(len(self.names), sum(name in found and found[name].done for name in self.names), wrong, seconds)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
