"""bench/static/compare.py: what got worse between two runs of a compile gate is found, row by row, and ends 1."""

import json
import sys

import pytest

from tfkern.bench.static import compare
from tfkern.ending import InputError


def portable(variant: str, **changes) -> dict:
    """As compile_gate writes it."""
    config = dict(block_m=128, block_n=64, num_warps=4, num_stages=2, source="model")
    row = dict(arch="sm_90", kernel="flash_fwd", dtype="bf16", head_dim=64, variant=variant, config=config)
    return row | dict(registers=255, spilled=16, shared=49152, instructions=2664, problem=None) | changes


def hopper(tiles: str, **changes) -> dict:
    """As hopper_gate writes it: without an architecture, its tiles in words."""
    row = dict(kernel="flash_fwd", dtype="bf16", head_dim=64, variant="full", tiles=tiles)
    return row | dict(registers=168, spilled=0, shared=98672, instructions=3000, problem=None) | changes


BEFORE = [portable("plain"), portable("causal"), hopper("2 consumers x 128 s2"), hopper("1 consumers x 64 s2")]


def run(before: list, after: list, tmp_path, monkeypatch, capsys) -> tuple[int, list[str]]:
    paths = tmp_path / "before.json", tmp_path / "after.json"
    for path, rows in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, paths)])
    return compare.main(), capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("field", compare.COUNTED)
@pytest.mark.parametrize(("step", "verdict"), [(1, "worse"), (-1, "better")])
@pytest.mark.parametrize("place", range(len(BEFORE)))
def test_every_count_of_every_row_is_compared(field, step, verdict, place, tmp_path, monkeypatch, capsys):
    after = [dict(row) for row in BEFORE]
    after[place][field] += step
    status, (line, summary) = run(BEFORE, after, tmp_path, monkeypatch, capsys)
    assert status == (verdict == "worse")
    assert line.startswith(verdict)
    assert line.endswith(f"{field} {BEFORE[place][field]} -> {after[place][field]}")
    assert summary == "3 equal, " + ("0 better, 1 worse" if step > 0 else "1 better, 0 worse") + ", 0 missing, 0 new"


def test_equal_rows_in_another_order_print_nothing(tmp_path, monkeypatch, capsys):
    assert run(BEFORE, BEFORE[::-1], tmp_path, monkeypatch, capsys) == (0, ["4 equal, 0 better, 0 worse, 0 missing, 0 new"])


def test_less_of_one_thing_does_not_pay_for_more_of_another(tmp_path, monkeypatch, capsys):
    after = [portable("plain", spilled=0, instructions=2665), *BEFORE[1:]]
    status, (line, _) = run(BEFORE, after, tmp_path, monkeypatch, capsys)
    assert (status, line) == (1, "worse    sm_90 flash_fwd bf16 64 plain: spilled 16 -> 0, instructions 2664 -> 2665")


def test_rows_that_are_gone_fail_and_new_ones_do_not(tmp_path, monkeypatch, capsys):
    status, lines = run(BEFORE, BEFORE[1:], tmp_path, monkeypatch, capsys)
    assert (status, lines) == (1, ["missing  sm_90 flash_fwd bf16 64 plain", "3 equal, 0 better, 0 worse, 1 missing, 0 new"])
    status, lines = run(BEFORE[1:], BEFORE, tmp_path, monkeypatch, capsys)
    assert (status, lines[0]) == (0, "new      sm_90 flash_fwd bf16 64 plain")


def test_tiles_tell_rows_apart_only_where_the_rest_does_not(tmp_path, monkeypatch, capsys):
    """Of a variant with one row, other tiles are compared with the tiles before; the kernels for Hopper have two and more."""
    other = portable("plain", config=dict(BEFORE[0]["config"], block_n=32), registers=200)
    status, (line, _) = run(BEFORE, [other, *BEFORE[1:]], tmp_path, monkeypatch, capsys)
    assert (status, line) == (0, "better   sm_90 flash_fwd bf16 64 plain: registers 255 -> 200")
    moved = [*BEFORE[:3], hopper("1 consumers x 32 s2")]
    status, lines = run(BEFORE, moved, tmp_path, monkeypatch, capsys)
    assert status == 1
    assert lines[-1] == "3 equal, 0 better, 0 worse, 1 missing, 1 new"


@pytest.mark.parametrize(("problem", "numbers"), [("2 of 4 exponentials wait for nothing", True), ("does not compile", False)])
def test_a_new_problem_is_worse(problem, numbers, tmp_path, monkeypatch, capsys):
    row = portable("plain", problem=problem)
    row = row if numbers else {key: value for key, value in row.items() if key not in compare.COUNTED}
    status, lines = run(BEFORE, [row, *BEFORE[1:]], tmp_path, monkeypatch, capsys)
    assert status == 1
    assert lines[0].startswith("worse")
    assert problem in lines[0]
    status, _ = run([row, *BEFORE[1:]], [row, *BEFORE[1:]], tmp_path, monkeypatch, capsys)
    assert status == 0  # it was there before
    status, _ = run([row, *BEFORE[1:]], BEFORE, tmp_path, monkeypatch, capsys)
    assert status == 0  # it is gone


@pytest.mark.parametrize(
    ("text", "what"), [("[]", "has no rows"), ("{}", "has no rows"), ('[{"a": 1}]', "is not what"), ("[", "is not what")]
)
def test_files_that_are_no_tables_are_refused(text, what, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["compare", str(path), str(path)])
    with pytest.raises(InputError, match=what):
        compare.main()
    path.write_text(json.dumps([BEFORE[2], BEFORE[2]]))
    with pytest.raises(InputError, match="two rows of the same"):
        compare.main()
