"""A process that runs the cases of a step, one after the other as the supervisor names them, and sends it their rows.

Its messages are ("cases", names) once, then for each case any number of ("row", figures) and ("compiling", whether it is), and
("ended", whether the process can run another case). After an error of CUDA it cannot, since every later call fails too.
"""

import faulthandler
import gc
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tfkern import compat_triton
from tfkern.bench import faults

ROOT = Path(__file__).resolve().parents[2]
TEXT = 2000  # characters of an error that a row keeps, at most


# (name of a case, function that yields its rows), the most valuable case first.
Cases = Iterable[tuple[str, Callable[[], Iterator[dict]]]]
Serve = Callable[[Cases], None]


class Context:
    """The conditions of a step: its device, whether the run is a dry run, and its deadline on the clock of time.monotonic()."""

    def __init__(self, device: torch.device, dry: bool, deadline: float):
        self.device, self.dry, self.deadline = device, dry, deadline
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def left(self) -> float:
        return self.deadline - time.monotonic()


def plain(cases: Callable[[Context], Cases], context: Context, serve: Serve) -> None:
    """Run a step that is given as a function that returns its cases."""
    serve(cases(context))


def main(connection: Connection, run: Callable[[Context, Serve], None], dry: bool, interpret: bool, deadline: float, log: str):
    """Run the process: `run` the step, and serve its cases over `connection`. interpret: run kernels in Triton's interpreter.

    The process's output goes to the file `log`. On SIGUSR1 it writes its stack there.
    """
    os.setsid()  # a signal to the group ends also the processes that this one starts
    with open(log, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _tell_of_compiling(connection)
    try:
        if device.type == "cpu" and not dry:  # results of a CPU must never be taken for those of a GPU
            raise RuntimeError("the GPU is not there any more")
        run(Context(device, dry, deadline), lambda cases: _serve(connection, cases))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # skips CUDA's cleanup, which may hang


def _tell_of_compiling(connection: Connection) -> None:
    """Make Triton's compiler send a message when it begins and when it ends."""
    inside = []

    def telling(compile_):
        def compile_and_tell(*arguments, **options):
            connection.send(("compiling", True))
            inside.append(None)
            try:
                return compile_(*arguments, **options)
            finally:
                inside.pop()
                connection.send(("compiling", bool(inside)))

        return compile_and_tell

    compat_triton.around_compiling(telling)


def _serve(connection: Connection, cases: Cases) -> None:
    named = list(cases)
    functions = dict(named)
    if len(functions) < len(named):
        raise ValueError("two cases have one name")
    connection.send(("cases", list(functions)))
    while (name := connection.recv()) is not None:
        fit = _run(functions[name], lambda row: connection.send(("row", row)))
        connection.send(("ended", fit))
        if not fit:
            os._exit(0)


def _run(rows: Callable[[], Iterator[dict]], write: Callable[[dict], None]) -> bool:
    """Run a case, pass its rows to `write`, and return whether the process can run another case."""
    fit = True
    try:
        for row in rows():
            wrong = str(row.get("problem") or row.get("skipped") or "")
            if faults.is_sticky(wrong):  # also if the case gave it as a reason to skip
                fit = False
            write(row if fit else {**row, "problem": wrong, "skipped": None})
        _finish_device()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "")[:TEXT]
        fit = fit and not faults.is_sticky(error) and _device_is_fit()
        if faults.is_out_of_memory(error) and fit:  # too little memory is a result of the case
            write(dict(skipped=text.splitlines()[0]))
        else:
            write(dict(problem=text, where=_frames(error)))
        del error
        _free_memory()
    return fit


def _frames(error: Exception) -> list[str]:
    """The last six frames of an error's traceback, innermost last."""
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]


def _finish_device() -> None:
    """Wait for the GPU, so that an error is reported by the case that caused it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device_is_fit() -> bool:
    try:
        _finish_device()
    except Exception:  # any error here would come back in the next case
        return False
    return True


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized() and _device_is_fit():
        torch.cuda.empty_cache()
