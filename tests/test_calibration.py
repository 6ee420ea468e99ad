"""Predictions are calibrated on published figures, and their bands tell how sure that is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tfkern.bench.static import against, calibrate, calibration, geometry

BENCH = Path(__file__).resolve().parent.parent / "bench"
FORWARD = calibration.CLASSES["portable", "forward"]
ANEW = "run `python -m bench.static.calibrate` and commit bench/static/calibration.json"


def problem(length=2048, head_dim=64, causal=False) -> geometry.Problem:
    return geometry.Problem(max(1, 16384 // length), 2048 // head_dim, length, head_dim, causal)


def test_the_table_is_of_the_tiles_of_today():
    for row in calibration.table()["rows"]:
        group = calibration.Group(*(row[name] for name in calibration.Group._fields))
        assert row["tiles"] == calibrate.tiles(group), ANEW
        assert row["microseconds"].keys() == row["tiles"].keys()
    assert len(calibration.raw()) == len(calibration.GROUPS) - 1  # no backward in one launch at D = 128


def test_the_page_shows_the_table():
    page = (BENCH / "README.md").read_text()
    assert [line for line in calibrate.show().splitlines() if line.startswith("|") and line not in page] == []


@pytest.mark.slow
def test_the_table_is_what_the_model_says(compiling):
    """Every row again, with the same compiler."""
    if calibrate.aot.triton.__version__ != calibration.table()["triton"]:
        pytest.skip("compiled by another Triton than the table")
    assert compiling("import json; print(json.dumps(calibrate.fit()['rows']))") == calibration.table()["rows"], ANEW


def test_one_row_of_the_table_is_what_the_model_says(compiling):
    if calibrate.aot.triton.__version__ != calibration.table()["triton"]:
        pytest.skip("compiled by another Triton than the table")
    group = calibration.GROUPS[0]
    found = compiling(
        "group = calibration.GROUPS[0];print([calibrate.raw(group, group.problem(n)) for n in calibration.LENGTHS])"
    )
    assert found == pytest.approx(list(calibration.raw()[group].values()), rel=0.01), ANEW


@pytest.fixture
def compiling():
    """Runs Python that compiles kernels, and gives what it prints as JSON."""

    def run(program: str):
        environment = {"TRITON_INTERPRET": "0", "PATH": ""}
        command = [sys.executable, "-c", f"from bench.static import calibrate, calibration; {program}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=BENCH.parent)
        return json.loads(done.stdout)

    return run


def test_a_published_problem_is_predicted_at_what_was_published():
    for group, times in calibration.raw().items():
        for n in calibration.fitted()[group]:
            found = calibration.estimate(group.kind, group.direction, group.problem(n), times[n])
            expected = group.published(n)
            if group.kind == "hopper":
                expected = max(expected, times[n])
            assert found.microseconds == pytest.approx(expected), (group, n)
            assert found.holds(expected)
    # 64 x 12 x 512² scores of D = 64 at 340 TFLOP/s
    assert calibration.microseconds(geometry.Problem(64, 12, 512, 64, False), "forward", 340) == pytest.approx(151.6, abs=0.1)


def test_the_bands_hold_what_they_have_not_seen():
    """A length that is left out, and later figures: 9 of 10 at least. And they say something: none is wider than a factor of 2."""
    for found in (calibration.left_out(), calibration.later()):
        assert len(found) >= 18
        assert sum(held for _, _, held in found) >= 0.9 * len(found)
    assert all(calibration.widest(kind) < math.log(2) for kind in ("portable", "hopper"))


def test_a_figure_that_does_not_fit_falls_out_of_its_band(monkeypatch):
    """The test above can fail: with the model's time at one length in each column off by a factor of 2, it does."""
    off = json.loads(calibration.TABLE.read_text())
    for row in off["rows"]:
        if "4096" in row["microseconds"]:
            row["microseconds"]["4096"] *= 2
    for cached in (calibration.raw, calibration.fitted, calibration.widest):
        cached.cache_clear()
    monkeypatch.setattr(calibration, "table", lambda: off)
    held = [inside for _, _, inside in calibration.left_out()]
    monkeypatch.undo()
    for cached in (calibration.raw, calibration.fitted, calibration.widest):
        cached.cache_clear()
    assert sum(held) < 0.9 * len(held)


def test_width():
    """Level points miss nothing, so that only the codes' distance is left: at 1024 to 4096 tokens the largest is 342 and 262
    TFLOP/s; at 512 and 1024, 191 and 146."""
    level = dict.fromkeys(calibration.LENGTHS, 0.0)
    assert calibration.half_width(FORWARD, level, 2048) == pytest.approx(math.log(342 / 262))
    kink = level | {512: 0.4}
    assert calibration.half_width(FORWARD, kink, 512) == pytest.approx(math.hypot(0.4, math.log(191 / 146)))
    assert calibration.half_width(FORWARD, kink, 4096) < calibration.half_width(FORWARD, kink, 600)
    ends = {512: 0.3, 16384: 0.0}  # with two points, each is all that is known of the other
    assert calibration.half_width(calibration.CLASSES["hopper", "backward"], ends, 2048) > 0.3


def test_between_and_beyond_lengths():
    points = {512: 0.4, 2048: 0.0}
    found = [calibration.interpolated(points, n) for n in (100, 512, 1024, 2048, 9999)]
    assert found == pytest.approx([0.4, 0.4, 0.2, 0.0, 0.0])


@pytest.mark.parametrize(
    ("kind", "direction", "unknown"),
    [
        ("portable", "backward", problem(causal=True)),
        ("portable", "forward", problem(197)),
        ("portable", "forward", problem(32768)),
        ("portable", "forward", problem(head_dim=32)),
        ("portable", "forward", problem(head_dim=256)),
        ("hopper", "backward", problem(causal=True)),
        ("hopper", "forward", problem(128)),
        ("hopper", "backward in one launch", problem(512)),
    ],
)
def test_where_nothing_is_published_the_band_is_the_widest(kind, direction, unknown):
    found = calibration.scale(kind, direction, unknown)
    assert found.by == "not calibrated"
    known = [
        calibration.scale(kind, g.direction, g.problem(n)) for g, points in calibration.fitted().items() if g.kind == kind
        for n in points
    ]  # fmt: skip
    assert found.width == max(other.width for other in known)
    assert found.width > min(other.width for other in known)
    assert calibration.estimate(kind, direction, unknown, 1e4).by == "not calibrated"


def test_factors_are_those_of_the_nearest_group():
    near = calibration.scale("portable", "forward", problem(head_dim=80))
    assert near.factor == calibration.scale("portable", "forward", problem(head_dim=128)).factor
    assert near.factor != calibration.scale("portable", "forward", problem()).factor


def test_hopper_is_never_shown_faster_than_the_model():
    for group in calibration.fitted():
        for n in (64, 197, 512, 700, 2048, 16384, 65536):
            for causal in (False, True):
                asked = group.problem(n)._replace(batch=4, causal=causal)
                if group.kind == "hopper":
                    assert calibration.estimate(group.kind, group.direction, asked, 1e4).microseconds >= 1e4


def test_nothing_is_below_the_floor():
    small = problem(512)
    floor = calibration.floor(small, "forward")
    found = calibration.estimate("portable", "forward", small, floor / 2)
    assert found.microseconds == found.low == floor < found.high


def test_an_estimate_in_words():
    one, two = (calibration.Estimate(100.0, 80.0, 150.0, by) for by in ("Triton", "FA2"))
    assert str(one) == "100 (-20 … +50%)"
    assert (one + two).by == "Triton + FA2"
    assert (one + one).by == "Triton"
    assert (one + calibration.Estimate(1.0, 1.0, 2.0, calibration.NOT)).by == "not calibrated"
    assert (one + two).high == 300
    assert one.holds(80)
    assert not one.holds(151)


SHAPES = [
    dict(name="a", batch=32, heads=32, length=512, head_dim=64, is_causal=False),
    dict(name="odd", batch=32, heads=32, length=512, head_dim=80, is_causal=False),
]
ROWS = [
    dict(shape="a", direction="forward", provider="tfkern portable", ms=0.110),
    dict(shape="a", direction="forward", provider="tfkern portable", ms=0.100, graph=True),
    dict(shape="a", direction="forward+backward", provider="tfkern portable", ms=0.900, graph=True),
    dict(shape="a", direction="backward", provider="tfkern hopper", ms=0.500),
    dict(shape="a", direction="forward", provider="tfkern hopper", skipped="failed"),
    dict(shape="odd", direction="forward", provider="tfkern hopper", ms=1.0, tflops=1.0, graph=True),
    dict(shape="a", direction="forward", provider="sdpa flash", ms=1.0, tflops=1.0, graph=True),
    dict(model="gpt", attention="tfkern", ms=1.0),
]


def test_measured_beside_predicted(monkeypatch):
    """Of a time with Python and one without the latter counts. Forward + backward is predicted as their sum."""
    forward = calibration.Estimate(110.0, 90.0, 130.0, "Triton")
    backward = calibration.Estimate(500.0, 400.0, 600.0, calibration.NOT)
    monkeypatch.setattr(against.model, "estimate", lambda p, way, dtype: forward if way == "forward" else backward)
    monkeypatch.setattr(against.hopper_model, "estimate", lambda p, way, dtype: (backward, way))
    results = dict(machine=dict(device="NVIDIA H100", triton="3.6.0"), shapes=SHAPES, rows=ROWS)
    found = against.compare(results, "bf16")
    assert [(row["ms"], guess.microseconds) for row, guess, _ in found] == [(0.1, 110.0), (0.9, 610.0), (0.5, 500.0)]
    lines = against.text(found, "NVIDIA H100").splitlines()
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| a ")] == ["yes", "no", "yes"]
    assert lines[-2:] == ["Calibrated: 1 of 1 within their bands.", "Not calibrated: 1 of 2 within their bands."]


@pytest.mark.parametrize(("heads", "triton", "one"), [(32, "3.7.1", True), (32, "3.8.0", False), (1, "3.7.1", False)])
def test_the_backward_of_hopper_is_compared_with_the_form_that_ran(heads, triton, one):
    asked = geometry.Problem(8, heads, 512, 64, False)
    way = against.hopper_model.way(asked, "backward", triton)
    assert way == ("backward in one launch" if one else "backward")
    assert against.hopper_model.way(asked._replace(length=1024), "backward", triton) == "backward"
    assert against.hopper_model.way(asked, "forward", triton) == "forward"


def test_against_what(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["against", str(tmp_path / "none.json")])
    with pytest.raises(against.results.ResultsError, match=r"none.json can't be read .* `make gpu` writes results to"):
        against.main()
    machine = dict(device="x", torch="2.11.0", tfkern="0.2.0", date="2026-11-28", triton="3.6.0")
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(dict(machine=machine, shapes=SHAPES, rows=ROWS[4:])))
    monkeypatch.setattr(sys, "argv", ["against", str(empty)])
    assert against.main() == 1
    assert "has no time of tfkern's kernels" in capsys.readouterr().err
