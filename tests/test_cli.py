"""The command: each subcommand at its smallest, its exit status, its messages."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tfkern import cli, launch, testing
from tfkern.backends import BACKENDS, portable
from tfkern.commands import bench, demo, verify
from tfkern.commands.arguments import writable
from tfkern.ending import InputError
from tfkern.training import provenance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = provenance.label("portable", DEVICE)
DEFAULT = "cpu" if DEVICE.type == "cpu" else KERNELS
TFKERN = Path(sys.executable).with_name("tfkern")


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch    2." in out
    assert "portable  works; self-check" in out
    assert "eager     works; self-check" in out
    assert "by default" in out


def test_info_fails_when_a_backend_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(testing, "check", lambda *a: [testing.Error("out", 1.0, 0.1, 0.2)])
    assert cli.main(["info"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_verify(capsys, monkeypatch):
    monkeypatch.setattr(verify, "SHORT", ("one-query",))
    assert cli.main(["verify"]) == 0
    out = capsys.readouterr().out
    assert "9 passed, 0 failed" in out
    assert f"backends cpu, eager, {KERNELS}" in out.splitlines()[0]
    monkeypatch.setattr(testing, "check", lambda *a: [testing.Error("out", float("nan"), 0.1, 0.2)])
    assert cli.main(["verify"]) == 1
    assert "0 passed, 9 failed" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_verify_fits_its_terminal(columns):
    errors = [testing.Error(q, 1e-7, 2e-7, 2e-7 if q != "dq" else 0.0) for q in verify.QUANTITIES]
    lines = verify.Result(testing.CASES[0], "portable", torch.bfloat16, errors).text(columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) == (1 if columns == 200 else 6)
    assert "\n".join(lines).count("1.0e-07/") == 5
    assert lines[-1 if columns == 200 else 3].endswith("WRONG")  # dq


def test_processes_of_bench():
    """An end by a signal is a status; a terminal's interrupt does not come to it."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert bench.process(["-c", code]) == 128 + signal.SIGKILL
    assert bench.process(["-c", "raise SystemExit(3)"]) == 3
    assert bench.process(["-c", "import os; raise SystemExit(os.getsid(0) != os.getpid())"]) == 0


def test_what_a_process_of_bench_has_started_ends_with_it(tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
"""
    assert bench.process(["-c", code]) == 0
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):  # until whoever inherits it has taken note
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} runs on")


def test_train_generate_resume(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert cli.main(["train", "gpt", "--steps", "3", *out]) == 0
    told = capsys.readouterr().out
    assert "held-out loss" in told
    assert f"attention by {DEFAULT}\n" in told
    assert cli.main(["generate", "The ", "--checkpoint", str(tmp_path / "gpt.safetensors"), "--count", "5"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("The ")
    assert f"attention by {DEFAULT}:" in told.err
    assert cli.main(["train", "gpt", "--steps", "3", *out]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert cli.main(["train", "gpt", "--resume", *out]) == 0
    assert "going on after step 3 of 3" in capsys.readouterr().out
    assert cli.main(["train", "gpt", "--resume", "--steps", "9", *out]) == 2
    assert "--steps 9 does not fit" in capsys.readouterr().err


def test_bad_input_is_a_message_and_status_2(tmp_path, capsys):
    for arguments, message in [
        (["train", "vit", "--steps", "0"], "argument --steps: must be a whole number, 1 or more, but is '0'"),
        (["train", "vit", "--save-every", "0"], "argument --save-every: must be a whole number, 1 or more"),
        (["train", "vit", "--seed", str(2**63)], "argument --seed: must be a whole number, from 0 to 9223372036854775807"),
        (["train", "vit", "--resume", "--out", str(tmp_path)], "there is no checkpoint"),
        (["generate", "", "--checkpoint", "x"], "at least one character"),
        (["generate", "a", "--top-p", "0"], "argument --top-p: must be a number, from 1e-09 to 1.0"),
        (["generate", "a", "--checkpoint", str(tmp_path / "x")], "there is no checkpoint"),
        (["generate", "a", "--checkpoint", str(tmp_path)], "is a folder"),
        (["generate", "a", "--top-k", "0"], "argument --top-k: must be a whole number, 1 or more"),
        *((["generate", "--temperature", t], "argument --temperature: must be a number, 0") for t in ("nan", "inf", "-1", "x")),
        *((["bench", "--seconds", t], "argument --seconds: must be a number, 0.001 or more") for t in ("nan", "inf", "0")),
        (["bench", "report"], "report needs --results FILE"),
        (["bench", "report", "--results", str(tmp_path)], "can't be read (Is a directory)"),
        (["generate", "a", "--count", "-1"], "argument --count: must be a whole number, 0 or more, but is '-1'"),
    ]:
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["train", "llama"]) == 2


@pytest.mark.parametrize("command", [["demo"], ["train", "vit"], ["bench"]], ids=" ".join)
def test_a_folder_that_cannot_be(command, tmp_path, capsys):
    """Before any work is done."""
    (tmp_path / "file").touch()
    for out, reason in (("file", "File exists"), ("file/below", "Not a directory"), ("x" * 300, "File name too long")):
        assert cli.main([*command, "--out", str(tmp_path / out)]) == 2
        wanted = f"tfkern {command[0]}: --out must be a folder that can be written to, or one that can be made"
        found = capsys.readouterr()
        assert found.err == f"{wanted}, but {tmp_path / out}: {reason}\n"
        assert not found.out
    assert not writes(Path("/proc"))  # an existing one


def writes(folder: Path) -> bool:
    try:
        writable(folder)
    except InputError:
        return False
    return True


def test_resume_refuses_another_model(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert cli.main(["train", "gpt", "--steps", "1", *out]) == 0
    (tmp_path / "gpt.safetensors").rename(tmp_path / "vit.safetensors")
    assert cli.main(["train", "vit", "--resume", *out]) == 2
    assert "vit.safetensors is of gpt, but vit is wanted" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["0", "-0.0", "5e-324", "1e-40", "1e308"])
def test_any_finite_temperature(temperature, gpt, capsys):
    assert cli.main(["generate", "The ", "--checkpoint", str(gpt), "--count", "3", f"--temperature={temperature}"]) == 0
    text = capsys.readouterr().out
    assert len(text) == len("The ") + 4
    if float(temperature) < 1:
        assert cli.main(["generate", "The ", "--checkpoint", str(gpt), "--count", "3", "--top-k", "1"]) == 0
        assert capsys.readouterr().out == text  # the likeliest


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """A checkpoint of a GPT."""
    folder = tmp_path_factory.mktemp("gpt")
    assert cli.main(["train", "gpt", "--steps", "1", "--out", str(folder)]) == 0
    return folder / "gpt.safetensors"


def test_generate_refuses_characters_that_the_model_does_not_know(gpt, capsys):
    assert cli.main(["generate", "日本", "--checkpoint", str(gpt)]) == 2
    assert "tfkern generate: the text has characters ['日', '本'] that are not known" in capsys.readouterr().err


def test_generate_refuses_another_model(tmp_path, capsys):
    assert cli.main(["train", "vit", "--steps", "1", "--out", str(tmp_path)]) == 0
    assert cli.main(["generate", "a", "--checkpoint", str(tmp_path / "vit.safetensors")]) == 2
    assert "vit.safetensors is of vit, but gpt is wanted; `tfkern train gpt` makes one" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupt_leaves_a_whole_checkpoint(tmp_path):
    command = [TFKERN, "train", "vit", "--steps", "100000", "--out", str(tmp_path), "--save-every", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=300)  # it may not hang
    assert process.returncode == 130
    assert "--resume goes on" in rest
    assert (tmp_path / "vit.safetensors").exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("what", ["compile", "sweep", "model", "overhead"])
def test_kernels_are_not_compiled_without_triton(what, capsys, monkeypatch):
    monkeypatch.setattr(launch, "missing", lambda: "Triton is not installed")
    assert cli.main(["bench", what]) == 2
    assert capsys.readouterr().err == "tfkern bench: this compiles kernels, but Triton is not installed\n"


@pytest.mark.parametrize("what", ["compile", "sweep", "model"])
def test_what_reads_machine_code_needs_a_checkout(what, capsys, monkeypatch):
    """The wheel has no bench/static."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "process", lambda arguments: pytest.fail("nothing may be started"))
    assert cli.main(["bench", what]) == 2
    assert "tfkern bench: this needs a checkout of tfkern" in capsys.readouterr().err


def test_missing_extra_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo"]) == 2
    assert "pip install '.[demo]'" in capsys.readouterr().err


@pytest.fixture
def small_demo(monkeypatch):
    """Few steps of each model, and a tiny GPT that Triton's interpreter trains in a second."""
    monkeypatch.setattr(demo, "QUICK_STEPS", 2)
    monkeypatch.setattr(demo, "QUICK_TINY_STEPS", 4)
    monkeypatch.setattr(demo, "KERNEL_CASES", ("one-query",))
    config = dataclasses.replace(demo.TINY.config, context=8, layers=1, heads=1, width=32)
    monkeypatch.setattr(demo, "TINY", dataclasses.replace(demo.TINY, config=config))


@pytest.mark.usefixtures("small_demo")
def test_demo_writes_its_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate"]) == 2
    assert "`tfkern train gpt` or `tfkern demo` writes one" in capsys.readouterr().err
    assert cli.main(["demo", "--quick"]) == 0
    out = tmp_path / demo.FOLDER
    written = {p.name for p in out.iterdir()}
    pictures = {"loss.png", "attention-text.png", "attention-digit.png"}
    assert written == {*pictures, "sample.txt", "results.json", "demo-gpt.safetensors"}
    assert all((out / name).stat().st_size > 1000 for name in pictures)
    assert cli.main(["generate", "--count", "2"]) == 0  # from what the demo left
    assert "by tfkern-out/demo/demo-gpt.safetensors, after step 2 of 2" in capsys.readouterr().err
    assert cli.main(["train", "gpt", "--steps", "1"]) == 0
    assert cli.main(["generate", "--count", "2"]) == 0
    assert "by tfkern-out/gpt.safetensors, after step 1 of 1" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["problems"] == []
    for name in ("gpt", "bert", "vit"):
        runs = results["models"][name]["runs"]
        assert list(runs) == ["naive", DEFAULT]
        assert all(len(run["losses"]) == 2 for run in runs.values())
    tiny = results["models"]["tiny gpt"]
    assert list(tiny["runs"])[::2] == ["naive", KERNELS]
    curves = [run["losses"] for run in tiny["runs"].values()]
    assert [len(curve) for curve in curves] == [4, 4, 4]
    assert 0 <= tiny["apart"] < 1e-5
    assert curves[0][3] < curves[0][0] - 0.1  # it learns
    assert tiny["runs"][KERNELS]["launches"]["flash_fwd"] == 4  # one layer, four steps
    for text in ((out / "sample.txt").read_text(), results["computed_by"]):
        assert re.search(rf"attention by .*{DEFAULT}.* torch \d.*, seed 0", text)


@pytest.mark.usefixtures("small_demo")
def test_demo_shows_whether_kernels_train(monkeypatch):
    """Another backend under their name launches none of them."""
    other = BACKENDS["eager"]
    monkeypatch.setitem(BACKENDS, "portable", other)
    run = demo.compared(demo.TINY, ("portable",), demo.TINY_APART, DEVICE, 2)
    problems = demo.judge({run.name: run}, quick=True)
    assert problems == ["tiny gpt: the kernels did not train it; launched were {}"]
    half = other._replace(forward=portable.forward)
    monkeypatch.setitem(BACKENDS, "portable", half)
    run = demo.compared(demo.TINY, ("portable",), 1.0, DEVICE, 2)
    problems = demo.judge({run.name: run}, quick=True)
    assert problems == ["tiny gpt: the kernels did not train it; launched were {'flash_fwd': 2}"]


@pytest.mark.usefixtures("small_demo")
def test_demo_fails_when_kernels_or_curves_are_wrong(tmp_path, capsys, monkeypatch):
    """A gradient of the kernels that is a tenth too large is one reason, and seen in the tiny GPT's curve alone."""

    def wrong(*arguments, **into):
        gradients = backend.backward(*arguments, **into)
        return gradients._replace(v=gradients.v * 1.1)

    backend = BACKENDS["portable"]
    monkeypatch.setitem(BACKENDS, "portable", backend._replace(backward=wrong))
    tiny = demo.compared(demo.TINY, ("portable",), demo.TINY_APART, DEVICE, 4)
    assert re.fullmatch(r"tiny gpt: the loss curves are \S+ nats apart, .*", *demo.judge({tiny.name: tiny}, quick=True))
    monkeypatch.setattr(demo, "CURVES_APART", -1.0)
    monkeypatch.setattr(demo, "write", lambda folder, *more: [(folder / "sample.txt").touch()])
    monkeypatch.setattr(testing, "check", lambda *a: [testing.Error(q, 1.0, 0.1, 0.2) for q in verify.QUANTITIES])
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "the kernels are wrong on one-query" in out
    for name in ("tiny gpt", "gpt", "bert", "vit"):
        assert f"\n{name}: the loss curves are" in out


def test_console_script_runs_without_a_repository(tmp_path):
    done = subprocess.run([TFKERN, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True, env=os.environ)
    assert done.stdout.startswith("tfkern 0.")
