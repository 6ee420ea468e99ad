"""A process that runs the cases of a step, one after the other as the supervisor names them, and tells it what comes.

What it says: ("cases", names) once, then for each case any number of ("row", figures) and ("compiling", whether), and
("ended", whether it can run another). After an error of CUDA it can't: that error comes back from every later call.
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
TEXT = 2000  # characters of an error that a row keeps


# A case's name and a function that makes its rows, the most valuable case first.
Cases = Iterable[tuple[str, Callable[[], Iterator[dict]]]]
Serve = Callable[[Cases], None]


class Context:
    """Where a step runs: the device, whether it is for show, and when its time is up."""

    def __init__(self, device: torch.device, dry: bool, deadline: float):
        self.device, self.dry, self.deadline = device, dry, deadline
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def left(self) -> float:
        return self.deadline - time.monotonic()


def plain(cases: Callable[[Context], Cases], context: Context, serve: Serve) -> None:
    """Run a step that is a generator of its cases."""
    serve(cases(context))


def main(connection: Connection, run: Callable[[Context, Serve], None], dry: bool, interpret: bool, deadline: float, log: str):
    """The process. Its output goes to the file `log`; SIGUSR1 writes there where it stands."""
    os.setsid()  # what it starts dies with it
    with open(log, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _tell_of_compiling(connection)
    try:
        if device.type == "cpu" and not dry:  # what a CPU gives must never stand for what a GPU gives
            raise RuntimeError("the GPU is not there any more")
        run(Context(device, dry, deadline), lambda cases: _serve(connection, cases))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without the leave of CUDA, which may hang


def _tell_of_compiling(connection: Connection) -> None:
    """Triton's compiler says when it begins and when it is through."""
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
    """Run a case; whether the process can run another."""
    fit = True
    try:
        for row in rows():
            wrong = str(row.get("problem") or row.get("skipped") or "")
            if faults.is_sticky(wrong):  # also where the case took it for a reason to pass something over
                fit = False
            write(row if fit else {**row, "problem": wrong, "skipped": None})
        _finish_device()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "")[:TEXT]
        fit = fit and not faults.is_sticky(error) and _device_is_fit()
        if faults.is_out_of_memory(error) and fit:  # how much there is is a fact about the case
            write(dict(skipped=text.splitlines()[0]))
        else:
            write(dict(problem=text, where=_frames(error)))
        del error
        _free_memory()
    return fit


def _frames(error: Exception) -> list[str]:
    """Where it was raised, innermost last."""
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]


def _finish_device() -> None:
    """Wait for the GPU, so that what a case did wrong is said in that case."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device_is_fit() -> bool:
    try:
        _finish_device()
    except Exception:  # whatever it is, the next case would meet it
        return False
    return True


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized() and _device_is_fit():
        torch.cuda.empty_cache()
