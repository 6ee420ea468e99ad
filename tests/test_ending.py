"""How commands end, how far they say they are, and how their tables fit."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tfkern import cli, progress
from tfkern.commands import info, tables
from tfkern.ending import InputError, ended

TFKERN = Path(sys.executable).with_name("tfkern")


def raising(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("--x must be y"), 2, "it: --x must be y\n"),
        (KeyError("refused"), 2, "it: 'refused'\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "it: a/b: No space left on device\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "it: No space left on device\n"),
        (OSError("the disk is gone"), 1, "it: the disk is gone\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(2), 2, ""),
    ],
)
def test_ends_with_a_status_and_a_line(error, status, line, capsys):
    assert ended("it", raising(error), (KeyError,)) == status
    assert capsys.readouterr() == ("", line)


def test_a_fault_of_ours_stays_one():
    with pytest.raises(RuntimeError):
        ended("it", raising(RuntimeError("a bug")))


@pytest.fixture
def standard_output(monkeypatch):
    """Puts sys.stdout on what a descriptor leads to."""

    def put(descriptor: int):
        monkeypatch.setattr(sys, "stdout", os.fdopen(descriptor, "w"))

    return put


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("text", ["short", "long " * 10_000], ids=["when flushed", "while written"])
@pytest.mark.parametrize(
    ("where", "status", "line"),
    [(closed_pipe, 141, ""), (full_disk, 1, "tfkern info: No space left on device\n")],
)
def test_output_that_nobody_takes(where, status, line, text, standard_output, monkeypatch, capsys):
    monkeypatch.setattr(info, "run", lambda args: print(text) or 0)
    standard_output(where())
    assert cli.main(["info"]) == status
    sys.stdout.close()  # as Python does at its end: nothing is left that it could complain about
    assert capsys.readouterr().err == line


def test_streams_that_are_closed_and_characters_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert ended("it", lambda: print("nobody") or 0) == 0
    sys.stdout.close()
    narrow = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(narrow, "ascii"))
    assert ended("it", lambda: print("5 µs") or 0) == 0
    assert narrow.getvalue() == b"5 \\xb5s\n"


COMMANDS = [
    ["verify"], ["demo", "--out", "demo"], ["train", "gpt"], ["generate", "--checkpoint", "gpt.safetensors", "--count", "1000000"],
    ["circuits"],
    ["bench", "--seconds", "9"], ["bench", "compile"], ["bench", "sweep"], ["bench", "model"], ["bench", "overhead"],
]  # fmt: skip


def interrupted(command: list, folder: Path, seconds: float) -> tuple[int, str]:
    """The status and all the output of a command that gets a terminal's Ctrl-C after so many seconds.

    A machine can be so fast that the command ends before; then it runs again and is interrupted after half as long.
    """
    process = subprocess.Popen(
        command, cwd=folder, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        out, _ = process.communicate(timeout=seconds)
        assert process.returncode == 0, out
        return interrupted(command, folder, seconds / 2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)  # waits for all that could still write: nothing of it runs on
        return process.returncode, out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(["info"], 0.5), (["bench", "overhead"], 5.0), *((one, 9.0) for one in COMMANDS)],
    ids=lambda x: " ".join(x) if isinstance(x, list) else str(x),
)
def test_interrupted_anywhere(arguments, seconds, tmp_path):
    """While it imports, begins, and works, with all that it has started, as by a terminal."""
    if arguments[0] == "generate":
        subprocess.run([TFKERN, "train", "gpt", "--steps", "1", "--out", tmp_path], check=True, stdout=subprocess.DEVNULL)
    status, out = interrupted([TFKERN, *arguments], tmp_path, seconds)
    assert status in (130, -signal.SIGINT)
    assert "Traceback" not in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.counted("ab", lambda x: f"at {x}, of a long name")) == ["a", "b"]
    clear = "\r\x1b[K"
    assert sys.stderr.getvalue() == f"{clear}1 of 2: at a, of a \r{clear}{clear}2 of 2: at b, of a \r{clear}"


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 6.0, 6.0, 7.0, 11.0, 11.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.counted("abcd", str)) == list("abcd")
    assert capsys.readouterr() == ("", "2 of 4: b\n4 of 4: d\n")


def test_progress_is_gone_when_a_command_fails(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    steps = progress.counted("ab", str)
    next(steps)
    steps.close()
    assert sys.stderr.getvalue().endswith("\x1b[K")


HEADINGS = ("case", "dtype", "out", "dq")
ROWS = [("causal", "float32", "1e-7 / 2e-7", "3e-7 / 4e-7"), ("vit-197", "bfloat16", "1e-3 / 2e-3", "30e-3 / 40e-3 !")]


@pytest.mark.parametrize("columns", [20, 40, 46, 47, 60, 80, 200])
def test_tables_fit(columns):
    text = tables.table(HEADINGS, ROWS, 2, columns)
    lines = text.splitlines()
    assert max(map(len, lines)) <= max(columns, 22)  # a cell with its heading is never cut
    for row in ROWS:
        assert all(cell in text for cell in row)
    if columns >= 47:
        assert lines[2:] == ["causal   float32   1e-7 / 2e-7  3e-7 / 4e-7", "vit-197  bfloat16  1e-3 / 2e-3  30e-3 / 40e-3 !"]
    else:
        assert lines[0] == "causal float32"
        assert re.search(r"^  out  1e-3 / 2e-3", text, re.M)
    assert (columns == 46) == ("out  1e-3 / 2e-3      dq   30e-3" in text)  # two beside each other
