"""The command: each subcommand at its smallest, its exit status, its messages."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tfkern import cli, testing
from tfkern.commands import demo, verify

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
    assert "6 passed, 0 failed" in capsys.readouterr().out
    monkeypatch.setattr(testing, "check", lambda *a: [testing.Error("out", float("nan"), 0.1, 0.2)])
    assert cli.main(["verify"]) == 1
    assert "0 passed, 6 failed" in capsys.readouterr().out


def test_train_generate_resume(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert cli.main(["train", "gpt", "--steps", "3", *out]) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert cli.main(["generate", "The ", "--checkpoint", str(tmp_path / "gpt.safetensors"), "--count", "5"]) == 0
    assert capsys.readouterr().out.startswith("The ")
    assert cli.main(["train", "gpt", "--steps", "3", *out]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert cli.main(["train", "gpt", "--resume", *out]) == 0
    assert "going on after step 3 of 3" in capsys.readouterr().out
    assert cli.main(["train", "gpt", "--resume", "--steps", "9", *out]) == 2
    assert "--steps 9 does not fit" in capsys.readouterr().err


def test_bad_input_is_a_message_and_status_2(tmp_path, capsys):
    for arguments, message in [
        (["train", "vit", "--steps", "0"], "argument --steps: must be a whole number, 1 or more, but is '0'"),
        (["train", "vit", "--resume", "--out", str(tmp_path)], "there is no checkpoint"),
        (["generate", "", "--checkpoint", "x"], "at least one character"),
        (["generate", "a", "--checkpoint", str(tmp_path / "x")], "there is no checkpoint"),
        (["generate", "a", "--count", "-1"], "argument --count: must be a whole number, 0 or more, but is '-1'"),
    ]:
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["train", "llama"]) == 2


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


def test_missing_extra_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo"]) == 2
    assert "pip install '.[demo]'" in capsys.readouterr().err


def test_demo_writes_its_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "QUICK_STEPS", 2)
    monkeypatch.setattr(demo, "KERNEL_CASES", ("one-query",))
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    written = {p.name for p in tmp_path.iterdir()}
    pictures = {"loss.png", "attention-text.png", "attention-digit.png"}
    assert written == {*pictures, "sample.txt", "results.json", "demo-gpt.safetensors"}
    assert all((tmp_path / name).stat().st_size > 1000 for name in written if name.endswith(".png"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["problems"] == []
    for name in ("gpt", "bert", "vit"):
        assert len(results[name]["fused"]) == len(results[name]["naive"]) == 2


def test_demo_fails_when_kernels_or_curves_are_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "QUICK_STEPS", 2)
    monkeypatch.setattr(demo, "KERNEL_CASES", ("one-query",))
    monkeypatch.setattr(demo, "CURVES_APART", -1.0)
    monkeypatch.setattr(testing, "check", lambda *a: [testing.Error(q, 1.0, 0.1, 0.2) for q in verify.QUANTITIES])
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "the kernels are wrong on one-query" in out
    assert "the loss curves are" in out


def test_console_script_runs_without_a_repository(tmp_path):
    done = subprocess.run([TFKERN, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True, env=os.environ)
    assert done.stdout.startswith("tfkern 0.")
