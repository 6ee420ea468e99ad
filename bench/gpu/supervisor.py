"""Run the cases of a step in separate processes and write their rows as they come. If a case ends its process, by an error of
CUDA, a crash or the watchdog, another process goes on with the next case.

The watchdog allows `quiet` seconds from one row to the next; time in Triton's compiler has a bound of its own. A case that
failed, hung or was cut off is not done. A later call tries it again, after the cases that were never tried.
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
GOING = 2.0  # seconds that a process may take to exit
STACK = 0.2  # seconds that a process gets to write its stack
TICK = 0.5  # seconds at most between two checks of the watchdog
START = "start"  # the name of the case that stands for the time until a step has named its cases


@dataclass(frozen=True)
class Step:
    """A step, and how to run it.

    seconds: its weight when the time of a call is shared among its steps. workers: the number of its processes. quiet: the
    seconds that a case may take from one row to the next. alone: each case runs in a process of its own. always: the step runs
    in every call, also if earlier calls have done its cases. fake: a dry run compiles kernels for a GPU that is not there, in
    place of interpreting them.
    """

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
    """How many cases a step has, how many are done and how many have problems, and the seconds that it took."""

    cases: int = 0
    done: int = 0  # by this call or an earlier one
    problems: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        wrong = f", {self.problems} with problems" if self.problems else ""
        return f"{self.done} of {self.cases} cases{wrong}, {self.seconds:.0f} s"


class Process:
    """One process of a step, the case that it runs, and the time of the last message from it."""

    def __init__(self, step: Step, dry: bool, deadline: float, folder: str):
        context = multiprocessing.get_context("forkserver")  # torch is imported once; each process starts CUDA itself
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
        """Send the process the name of its next case, or None to let it exit."""
        self.case, self.since, self.compiling = case, time.monotonic(), False
        with contextlib.suppress(OSError):  # the process is gone, which _hear notices
            self.connection.send(case)

    def overdue(self, slow: float) -> str | None:
        """The reason why the process has to be ended, or None. `slow` multiplies the step's `quiet` seconds: how many times
        slower than a GPU the machine is."""
        limit, what = self.step.quiet * slow, "no row"
        if not self.named:
            limit, what = STARTING, "no list of cases"
        elif self.compiling:
            limit, what = COMPILING, "one kernel was not compiled"
        silent = time.monotonic() - self.since
        return f"hung: {what} in {limit:.0f} s" if silent > limit else None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. On SIGUSR1 the process writes its stack to its log. SIGKILL goes also to the processes that it has
        started."""
        with contextlib.suppress(OSError):
            (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)

    def end(self, patience: float = 0.0, killed: float = 5.0) -> str:
        """End the process, and return how it ended and the end of its output. It gets `patience` seconds to end by itself,
        and is then killed. The wait after that is at most `killed` seconds, since the GPU may hold the process."""
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
    """Runs steps, one after the other, and writes their rows to one file. The fields of `about` go into each row. `cut` returns
    whether the run has to stop."""

    def __init__(self, rows: RowFile, dry: bool, cut: Callable[[], bool] = lambda: False, about: dict | None = None):
        self.rows, self.dry, self.cut, self.about = rows, dry, cut, about or {}
        self.slow = 8.0 if dry else 1.0

    def run(self, step: Step, seconds: float) -> Outcome:
        """Run the cases of a step that are not done, for `seconds` or until `cut` returns true, and return the outcome."""
        start = time.monotonic()
        self.step, self.until = step, start + seconds
        self.names: list[str] = []
        self.queue: deque[str] | None = None  # None until a process has named the cases
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
        """Receive and handle the next message of a process. If the process has ended without one, it is lost."""
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
        """Queue the cases that were never tried, then those that were tried and are not done. A step with `always`
        queues all its cases."""
        self._write(START, dict(ended=_now()))
        self.names = names
        before = {} if self.step.always else tries(self.rows.rows)
        last = {case: found for (step, case), found in before.items() if step == self.step.name}
        again = [case for case, found in last.items() if case in names and not found.done]
        self.queue = deque([*(name for name in names if name not in last), *again])

    def _start(self) -> None:
        self.crew.append(Process(self.step, self.dry, self.until, self.folder))

    def _next(self, process: Process) -> None:
        """Give a process the next case of the queue, or end it if there is none."""
        if self.queue:
            self._write(case := self.queue.popleft(), dict(began=_now()))
            process.give(case)
        else:
            process.give(None)
            process.end(GOING)
            self.crew.remove(process)

    def _replace(self, process: Process) -> None:
        """Remove a process, and start another in its place if there are cases left."""
        self.crew.remove(process)
        if self.queue and self.startable:
            self._start()

    def _lost(self, process: Process, reason: str, patience: float) -> None:
        """Record a problem for a process that hung or ended within a case or before it named its cases, and replace the
        process."""
        how = process.end(patience)
        self.startable &= process.named  # if this one could not name its cases, the next cannot either
        self._write(process.case or START, dict(problem=f"{reason}: {how}"))
        self._replace(process)

    def _stop(self, reason: str) -> None:
        """End all processes, and mark the cases that they were running as cut off, for `reason`."""
        for number, wait_for in ((signal.SIGUSR1, STACK), (signal.SIGKILL, 0.0)):
            for process in self.crew:
                process.signal(number)
            time.sleep(wait_for)
        by = time.monotonic() + 5.0  # the limit for all processes together
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
