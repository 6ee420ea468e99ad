"""The bookkeeping of tests/mutation: what a run keeps, and when it is good enough. Breaking the kernels takes an hour: `make mutants`."""

import json
import runpy
import sys
from pathlib import Path

import pytest

MUTATION = Path(__file__).resolve().parent / "mutation"


@pytest.fixture(scope="module")
def program():
    """The functions of tests/mutation, and of the files beside it."""
    before = list(sys.path)
    found = runpy.run_path(str(MUTATION / "__main__.py"))
    sys.path[:] = before
    return found


def test_without_a_run_there_is_nothing_to_read(program, tmp_path):
    """The message names the file and the command that writes it."""
    with pytest.raises(SystemExit, match=r"last\.json is not there: `make mutants` writes it"):
        program["last"](tmp_path / "last.json")
    (tmp_path / "last.json").write_text(json.dumps({"band.py: a -> b": None}))
    assert program["last"](tmp_path / "last.json") == {"band.py: a -> b": None}


def test_what_is_kept_is_not_in_the_repository(program):
    assert {path.name for path in MUTATION.glob("*.json")} == {"equivalent.json"}
    ignored = (MUTATION.parent.parent / ".gitignore").read_text().split()
    assert program["LAST"].relative_to(MUTATION.parent.parent).parts[0] + "/" in ignored


@pytest.mark.parametrize(
    ("killed", "reasons", "good"),
    [(20, {}, True), (19, {"m19": "why"}, True), (19, {}, False), (18, {"m18": "", "m19": ""}, False)],
)
def test_a_run_is_good_if_enough_is_killed_and_the_rest_has_a_reason(program, killed, reasons, good):
    """Of 20 mutants: 95% are 19."""
    found = {f"m{i}": program["Mutant"]("band.py", i, "a < b", "a <= b", "") for i in range(20)}
    results = {name: "test" if i < killed else None for i, name in enumerate(found)}
    text, verdict = program["conclude"](found, results, reasons)
    assert verdict is good
    assert f"| band.py | 20 | {killed} | {20 - killed} |" in text
