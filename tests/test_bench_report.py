"""Tables and plots of `make gpu`: of one card, with its floor, like beside like."""

import json
import math

import pytest

from tfkern import cli
from tfkern.bench import chips, report, runner
from tfkern.bench.shapes import GPU_SHAPES

SXM = "NVIDIA H100 80GB HBM3"
SHAPE = "bert-base-512"


def timed(provider: str, ms: float, direction: str = "forward", graph: bool = True, **more) -> dict:
    figures = dict(ms=ms, p20=ms, p80=ms, tflops=1.0, graph=graph)
    return dict(step="headline", case=provider, shape=SHAPE, direction=direction, provider=provider, **figures, **more)


ROWS = [
    timed("tfkern portable", 0.2, kernels=["flash_fwd 128x64 w4 s2"], commit="abc1234"), timed("sdpa flash", 0.4),
    timed("sdpa default", 0.3, kernels=["CUDNN_ATTENTION"]), timed("naive", 0.1),
    timed("tfkern portable", 0.25, graph=False), timed("tfkern portable", 0.6, direction="backward"),
    dict(step="headline", case="x", shape=SHAPE, direction="backward", provider="sdpa cudnn", graph=True, skipped="wrong results"),
    dict(step="memory", case="x", provider="tfkern portable", length=1024, bytes=2**20),
    dict(step="peer-faults", case="x", fault="192 keys", provider="sdpa cudnn", finite=dict(out=True, dq=False), wrong="dq: error nan"),
    dict(step="peer-faults", case="y", fault="192 keys", provider="tfkern portable", finite=dict(out=True, dq=True)),
    dict(
        step="peer-faults", case="z", fault="64 keys", provider="sdpa default", finite=dict(out=True), kernels=["MATH"],
        wrong="dk: error 2, budget 1",
    ),
    dict(step="tune", case="x", backend="hopper", kernel="flash_bwd", shape="197", own=True, tiles="6,2", ms=0.4),
    dict(step="tune", case="y", backend="hopper", kernel="flash_bwd", shape="197", own=False, tiles="6,1", ms=0.3),
]  # fmt: skip


@pytest.fixture
def written(tmp_path, capsys):
    def write(device: str = SXM, rows=ROWS):
        results = report.write(rows, tmp_path, dict(runner.machine(), device=device, triton="3.6.0", commit="fff0000"))
        return results, report.table(results)

    return write


def test_table(written):
    text = written()[1]
    assert text.startswith(f"{SXM}, torch ")
    assert ", commit abc1234, " in text  # of the rows, not of who draws
    assert (
        f"| {SHAPE} | forward | CUDA graph | tfkern portable (flash_fwd 128x64 w4 s2) | 0.200 (1) "
        "| sdpa default (CUDNN_ATTENTION) | 0.300 | 1.50x | 34% |" in text
    )  # the naive formula is no peer
    assert f"| {SHAPE} | forward | calls | tfkern portable | 0.250 (1) |  |  |  | 27% |" in text  # no peer was timed so
    assert f"| {SHAPE} | backward | CUDA graph | tfkern portable | 0.600 (1) |  |  |  | " in text
    assert "| scores near -120 | sdpa cudnn | tfkern portable | sdpa default |\n" in text
    assert "| 192 keys | dq not finite | right |  |\n| 64 keys |  |  | wrong: dk: error 2, budget 1 (MATH) |" in text
    assert "| hopper flash_bwd | 197 | 0.400 | 0.300 | 6,1 |" in text


def test_floors_are_of_the_card_that_was_there(written):
    assert "of the floor of an H100" in written()[1]
    assert "of the floor of an H200" in written("NVIDIA H200")[1]
    for device in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB", "GPU"):
        assert "floor" not in written(device)[1]
    memory = next(shape for shape in GPU_SHAPES if shape.length == 197)  # bound by memory, which an H200 has more of
    h100, h200 = (report.floor_ms(memory, "forward", report.chip(name)[1]) for name in (SXM, "NVIDIA H200"))
    assert h200 < h100 == chips.floor(*(memory.flops("forward"), memory.exps("forward"), memory.bytes("forward", 2))) / 1e3


def test_cards_are_not_mixed(written):
    faster = timed("tfkern portable", 0.01, device="NVIDIA H200")
    results, text = written(rows=[*[dict(row, device=SXM) for row in ROWS], faster])
    assert "0.010" not in text
    assert "1 rows of other cards are not in these tables." in text
    assert all(row["device"] == SXM for row in report.load(results)[1])


def lines_of(status: int, arguments: list, capsys) -> str:
    assert cli.main(list(map(str, arguments))) == status
    return capsys.readouterr().err


def damages(whole: dict):
    """(what, text) of files that are almost results."""
    text = json.dumps(whole)
    yield from (("JSON", text[:end]) for end in (0, 1, len(text) // 2, len(text) - 1))
    yield from (("shapes and rows", x) for x in ("[]", "null", "3"))
    for part in ("machine", "shapes", "rows"):
        yield part, json.dumps({k: v for k, v in whole.items() if k != part})
        yield part, json.dumps({**whole, part: [3]})
    for key in ("device", "torch", "tfkern", "date"):
        yield (
            f"machine has {key} None",
            json.dumps({**whole, "machine": {k: v for k, v in whole["machine"].items() if k != key}}),
        )
    for row, keys in (
        (0, ("shape", "graph", "tflops")),
        (7, ("provider", "length")),
        (8, ("fault",)),
        (11, ("backend", "tiles")),
    ):
        for key in keys:
            rows = [{k: v for k, v in x.items() if n != row or k != key} for n, x in enumerate(whole["rows"])]
            yield f"rows[{row}] has {key} None", json.dumps({**whole, "rows": rows})
    for value in (0, -1.0, "0.2", math.nan, math.inf, True):
        yield f"rows[0] has ms {value!r}", json.dumps({**whole, "rows": [{**whole["rows"][0], "ms": value}]})
    yield "shapes that this version", json.dumps({**whole, "rows": [{**whole["rows"][0], "shape": "of old"}]})


def test_what_is_no_results_file(written, tmp_path, capsys):
    """A line that names it, of both commands that read one."""
    results, _ = written()
    file = tmp_path / "damaged.json"
    for what, text in damages(json.loads(results.read_text())):
        file.write_text(text)
        line = lines_of(2, ["bench", "report", "--results", file], capsys)
        assert line.startswith(f"tfkern bench: {file} ")
        assert what in line
    for path in (tmp_path / "none.json", tmp_path, results / "below"):
        assert f"{path} can't be read" in lines_of(2, ["bench", "report", "--results", path], capsys)


def test_a_readme_without_a_place_stays_as_it_is(written, tmp_path, capsys):
    results, _ = written()
    readme = tmp_path / "README.md"
    for text in ("nothing", report.BEGIN, f"{report.END} {report.BEGIN}"):
        readme.write_text(text)
        line = lines_of(2, ["bench", "report", "--results", results, "--readme", readme], capsys)
        assert "has no place for the table" in line
        assert readme.read_text() == text
    assert "README.md: No such file" in lines_of(
        1, ["bench", "report", "--results", results, "--readme", tmp_path / "x" / "README.md"], capsys
    )


def test_pictures_csv_and_readme(written, tmp_path):
    results, text = written()
    assert {p.name.split("-", 3)[-1] for p in report.draw(results)} == {"tflops.png", "ratio.png", "memory.png"}
    assert results.with_suffix(".csv").read_text().count("\n") == 1 + len(ROWS)
    assert json.loads(results.read_text())["rows"] == ROWS
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.insert(text, readme)
    assert readme.read_text() == f"before\n{report.BEGIN}\n{text}\n{report.END}\nafter\n"
