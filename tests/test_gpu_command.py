"""`make gpu` without a GPU: steps keep their rows, go on where they stopped, and tell what went wrong; reports are drawn from files."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tfkern.bench import gpu, report, runner, steps

pytestmark = pytest.mark.cpu  # on a GPU `make gpu` itself is run


def command(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tfkern.bench.gpu", "--out", str(tmp_path), *arguments], capture_output=True, text=True,
        check=False, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip


def rows(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "dry-run" / "rows.jsonl").read_text().splitlines()]


def test_every_step_has_a_time_and_a_doing():
    assert set(gpu.STEPS) == set(steps.STEPS)


def test_without_a_gpu_it_says_so(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_dry_run_and_again(tmp_path):
    first = command(tmp_path, "--dry-run", "--only", "attention", "memory")
    assert first.returncode == 0, first.stdout + first.stderr
    found = rows(tmp_path)
    timed = [row for row in found if "ms" in row]
    assert {row["provider"] for row in timed} >= {"tfkern portable", "tfkern eager", "sdpa default", "naive"}
    assert {row["direction"] for row in timed} == {"forward", "backward", "forward+backward"}
    assert [row["name"] for row in found if row["step"] == "end"] == ["attention", "memory"]
    folder = tmp_path / "dry-run"
    (results,) = folder.glob("*.json")
    assert json.loads(results.read_text())["machine"]["torch"] == torch.__version__
    assert results.with_suffix(".csv").read_text().count("\n") > len(timed)
    assert len(list(folder.glob("*.png"))) == 2
    again = command(tmp_path, "--dry-run", "--only", "attention", "memory")
    assert again.returncode == 0
    assert rows(tmp_path) == found  # nothing was done twice


def test_a_step_goes_on_after_a_case_that_broke(tmp_path, monkeypatch):
    def cases(context):
        yield "good", lambda: iter([dict(figure=1)])
        yield "bad", lambda: (_ for _ in ()).throw(RuntimeError("it broke"))
        yield "next", lambda: iter([dict(figure=2)])

    monkeypatch.setitem(steps.STEPS, "repeat", cases)
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["steps", "repeat", "--rows", str(file), "--seconds", "60", "--dry-run"])
    assert steps.main() == 1
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["case"] for row in found] == ["good", "bad", "next"]
    assert report.problems(file) == ["repeat bad: RuntimeError: it broke"]
    # what broke is tried again, what did not is not
    monkeypatch.setitem(steps.STEPS, "repeat", lambda context: ((c, lambda: iter([dict(figure=3)])) for c in ("good", "bad")))
    assert steps.main() == 0
    found = {row["case"]: row["figure"] for row in map(json.loads, file.read_text().splitlines())}
    assert found == {"good": 1, "next": 2, "bad": 3}
    monkeypatch.setattr(sys, "argv", ["steps", "repeat", "--rows", str(file), "--seconds", "0", "--dry-run"])
    monkeypatch.setitem(steps.STEPS, "repeat", lambda context: iter([("late", lambda: iter([]))]))
    assert steps.main() == 3


def test_wrong_results_are_a_problem(tmp_path, monkeypatch):
    from tfkern.bench import providers

    monkeypatch.setitem(providers.PROVIDERS, "tfkern wrong", lambda shape, dtype, device: lambda q, k, v: q + k + v)
    context = steps.Context(torch.device("cpu"), True, 1e12)
    found = {case: list(make()) for case, make in steps.attention(context) if case.endswith(" wrong")}
    assert len(found) == 2
    assert all(row["problem"].startswith("wrong results") for rows in found.values() for row in rows)
    assert not any("ms" in row for rows in found.values() for row in rows)


def test_table_ratio_and_readme(tmp_path):
    shape, kinds = "bert-base-512", ("forward", "backward")
    made = [
        dict(step="attention", case=name, shape=shape, direction=d, provider=name, ms=ms, p20=ms, p80=ms, tflops=1.0, graph=False)
        for d in kinds for name, ms in (("tfkern portable", 0.2), ("sdpa cudnn", 0.3), ("sdpa flash", 0.4), ("naive", 0.1))
    ]  # fmt: skip
    made.append(dict(step="memory", case="x", provider="tfkern portable", length=1024, bytes=2**20))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    results = report.write(file, tmp_path, dict(runner.machine(), device="GPU"))
    text = report.table(results)
    assert "| bert-base-512 | forward | 0.200 (1) | sdpa cudnn | 0.300 | 1.50x | 34% |" in text  # the naive formula is no peer
    assert {p.name.split("-", 3)[-1] for p in report.draw(results)} == {"tflops.png", "ratio.png", "memory.png"}
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.insert(text, readme)
    assert readme.read_text() == f"before\n{report.BEGIN}\n{text}\n{report.END}\nafter\n"
