"""`tfkern bench cpu`: everybody computes the same, what is wrong is not timed, and the table says what was measured."""

import functools
import json

import pytest
import torch

from tfkern import cli
from tfkern.bench import cpu, cpu_cases, cpu_memory, cpu_models

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """FlexAttention would take a minute to compile."""
    monkeypatch.setattr(cpu_cases.shutil, "which", lambda name: None)


@pytest.mark.parametrize("direction", cpu.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", cpu_cases.CASES)
def test_everybody_is_right(name, dtype, direction):
    rows = list(cpu.figures(cpu_cases.task(name, 70, dtype), direction, 0.001))
    timed = {row["provider"] for row in rows if "ms" in row}
    assert timed == ({"tfkern", "naive"} if name in ("softcap", "sinks") else {"tfkern", "sdpa", "naive"})
    assert all("wrong" not in row.get("skipped", "") for row in rows)


@pytest.mark.parametrize("direction", cpu.DIRECTIONS)
@pytest.mark.parametrize("name", ["window", "packed", "bias with gradient"])
def test_what_is_wrong_is_not_timed(name, direction):
    task = cpu_cases.task(name, 40, torch.float32)
    for provider in ("tfkern", "naive"):
        right = task.providers[provider].function
        task.providers[provider].function = lambda *leaves, f=right: f(*leaves) * 1.001
    rows = {row["provider"]: row for row in cpu.figures(task, direction, 0.001)}
    assert "wrong results: off by" in rows["tfkern"]["problem"]
    assert "wrong results" in rows["naive"]["skipped"]
    assert "ms" in rows["sdpa"]


def test_a_nan_beside_dropout_is_not_timed():
    task = cpu_cases.task("dropout", 40, torch.float32)
    task.providers["tfkern"].function = lambda q, k, v: q * torch.nan
    (row,) = (row for row in cpu.figures(task, "forward", 0.001) if row["provider"] == "tfkern")
    assert "problem" in row


def test_calls_take_turns():
    order = []
    times = cpu.in_turn({name: functools.partial(order.append, name) for name in "ab"}, 0.0)
    assert "".join(order) == ("abba" * cpu.ROUNDS)[: 2 * cpu.ROUNDS]
    assert len(times["a"]) == len(times["b"]) == cpu.ROUNDS


def test_ratios_are_to_the_faster():
    about = dict(threads=1, dtype="fp32", direction="forward", case="full", length=8)
    rows = [dict(about, provider=name, ms=ms) for name, ms in (("tfkern", 3.0), ("sdpa", 2.0), ("naive", 4.0), ("flex", 1.0))]
    (row,) = cpu.ratios(rows)
    assert row["ratio"] == 1.5
    assert "| full | 1.50 |" in cpu.table(rows)
    assert cpu.ratios(rows[:1]) == []


def test_command(tmp_path, capsys):
    arguments = [
        "--seconds",
        "0.001",
        "--lengths",
        "8",
        "20",
        "--threads",
        "1",
        "--cases",
        "full",
        "window",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["bench", "cpu", *arguments]) == 0
    loaded = json.loads((tmp_path / "cpu.json").read_text())
    assert {row["length"] for row in loaded["rows"]} == {8, 20}
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert "| window |" in capsys.readouterr().out
    assert cli.main(["bench", "cpu", "--cases", "fulll", "--out", str(tmp_path)]) == 2
    assert "--cases has ['fulll']; the cases are ['full'" in capsys.readouterr().err


@pytest.mark.slow
def test_memory():
    rows = list(cpu_memory.run([256, 2048]))
    assert not any("problem" in row for row in rows)
    naive = {row["memory"]: row["bytes"] for row in rows if (row["provider"], row["length"]) == ("naive", 2048)}
    assert min(naive.values()) > 2 * 4 * 2048**2
    lines = cpu_memory.table(rows).splitlines()
    assert lines[0] == "| MiB at N = | 256 | 2048 |"
    assert f"{naive['dropout'] / 2**20:.0f} |" in next(line for line in lines if line.startswith("| dropout, naive"))


@pytest.mark.slow
def test_models():
    pytest.importorskip("transformers", reason="transformers has the models")
    rows = list(cpu_models.run(0.001))
    assert sum("ratio" in row for row in rows) >= 4
    assert not any("problem" in row for row in rows)
