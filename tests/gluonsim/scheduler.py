"""Coroutines, and the schedules that decide what happens next."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from .errors import DeadlockError
from .sites import kernel_site


class Cancelled(BaseException):
    """Unwinds a coroutine that is not going to be resumed."""


class Coroutine:
    """A function that can pause from within nested calls; it runs on a thread of its own, but only while resumed."""

    def __init__(self, body: Callable[[], None], name: str):
        self.name = name
        self.finished = False
        self._body = body
        self._error: BaseException | None = None
        self._cancelled = False
        self._resumed = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def resume(self) -> None:
        """Run until it pauses or ends; raises what its body raised."""
        if not self._started:
            self._thread.start()
        self._resumed.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Hand control back to where it was resumed from; called from within the body."""
        self._paused.release()
        self._resumed.acquire()
        if self._cancelled:
            raise Cancelled

    def cancel(self) -> None:
        """Unwind the body from where it paused, if it did."""
        self._cancelled = True
        if self._started and not self.finished:
            self.resume()

    @property
    def _started(self) -> bool:
        return self._thread.ident is not None

    def _run(self) -> None:
        self._resumed.acquire()
        try:
            self._body()
        except Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.finished = True
            self._paused.release()


class Operation(Protocol):
    """Asynchronous work in flight: the scheduler chooses when, once it can, it is performed."""

    kind: str

    @property
    def performable(self) -> bool: ...

    def perform(self) -> None: ...


@dataclass(frozen=True)
class Wait:
    """What a task is blocked on."""

    is_over: Callable[[], bool]
    needs: Callable[[Operation], bool]
    """Whether an operation in flight can help to end the wait."""
    reason: Callable[[], str]
    site: str


class Task(Coroutine):
    """A coroutine that the scheduler runs, and that can block."""

    def __init__(self, body: Callable[[], None], name: str):
        super().__init__(body, name)
        self.wait: Wait | None = None

    @property
    def runnable(self) -> bool:
        return not self.finished and (self.wait is None or self.wait.is_over())


class Schedule(Protocol):
    """Chooses what happens next: which task runs, or which operation, the most urgent of which come first."""

    def choose(self, current: Task, runnable: Sequence[Task], in_flight: Sequence[Operation]) -> Task | Operation | None: ...


class FixedSchedule:
    """Operations of the ``early`` kinds are performed as soon as issued, the others only once a blocked task needs them.

    A task runs until it blocks; then the first one that can does.
    """

    def __init__(self, early: Sequence[str] = ()):
        self._early = frozenset(early)

    def choose(self, current: Task, runnable: Sequence[Task], in_flight: Sequence[Operation]) -> Task | Operation | None:
        early = next((operation for operation in in_flight if operation.kind in self._early), None)
        if early is not None:
            return early
        if current in runnable:
            return current
        return next(iter([*runnable, *in_flight]), None)


class RandomSchedule:
    """Draws the next step; the seed gives each task, each kind of operation and each operation a pace of its own.

    Very uneven paces are likely, so that one side of a missing synchronisation gets far ahead of the other.
    """

    _PACES = (0.01, 0.1, 1.0, 10.0)

    def __init__(self, seed: int | str):
        self._random = random.Random(seed)
        self._paces: dict[str, float] = {}
        self._operation_paces: MutableMapping[Operation, float] = WeakKeyDictionary()

    def choose(self, current: Task, runnable: Sequence[Task], in_flight: Sequence[Operation]) -> Task | Operation | None:
        steps = [*runnable, *in_flight]
        paces = [self._pace(self._paces, task.name) for task in runnable]
        paces += [
            self._pace(self._paces, operation.kind) * self._pace(self._operation_paces, operation) for operation in in_flight
        ]
        return self._random.choices(steps, paces)[0] if steps else None

    def _pace(self, paces: MutableMapping[Any, float], key: Any) -> float:
        if key not in paces:
            paces[key] = self._random.choice(self._PACES)
        return paces[key]


class Scheduler:
    """Runs tasks one at a time, switching among them and performing operations as the schedule chooses."""

    def __init__(self, schedule: Schedule):
        self.current: Task | None = None
        self._schedule = schedule
        self._tasks: list[Task] = []
        self._in_flight: list[Operation] = []

    @property
    def in_flight(self) -> Sequence[Operation]:
        return tuple(self._in_flight)

    def spawn(self, task: Task) -> None:
        self._tasks.append(task)

    def issue(self, operation: Operation) -> None:
        self._in_flight.append(operation)
        self.give_way()

    def run(self) -> None:
        """Run every task to its end."""
        try:
            while self._tasks:
                self.current = self._next_task()
                self.current.resume()
                self._tasks = [task for task in self._tasks if not task.finished]
        finally:
            for task in self._tasks:
                task.cancel()

    def perform_all(self) -> None:
        """Perform what is still in flight, in the order of issue."""
        while self._in_flight:
            self._in_flight.pop(0).perform()

    def give_way(self) -> None:
        """Let others go first, if the schedule wants them to; called by the current task."""
        task = self.current
        if self._next_task() is not task:
            task.pause()

    def block(
        self,
        is_over: Callable[[], bool],
        reason: Callable[[], str],
        needs: Callable[[Operation], bool] = lambda operation: False,
    ) -> None:
        """Pause the current task until the wait is over."""
        task = self.current
        task.wait = Wait(is_over, needs, reason, kernel_site())
        self.give_way()
        task.wait = None

    def _next_task(self) -> Task:
        while True:
            runnable = [task for task in self._tasks if task.runnable]
            waits = [task.wait for task in self._tasks if task not in runnable]
            performable = [operation for operation in self._in_flight if operation.performable]
            performable.sort(key=lambda operation: not any(wait.needs(operation) for wait in waits))
            choice = self._schedule.choose(self.current, runnable, performable)
            if choice is None:
                raise DeadlockError(self._describe_deadlock())
            if isinstance(choice, Task):
                return choice
            self._in_flight.remove(choice)
            choice.perform()

    def _describe_deadlock(self) -> str:
        waits = [f"  {task.name} waits at {task.wait.site} for {task.wait.reason()}" for task in self._tasks]
        return "\n".join(["every partition is blocked:", *waits])
