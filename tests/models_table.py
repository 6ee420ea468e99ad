"""Write docs/models.md, the tables of models that work, from a run of their tests and from tests/models_sweep.json: python
tests/models_table.py"""

import functools
import importlib.metadata
import importlib.util
import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent))
import models_sweep
import models_sweep_table

TESTS = Path(__file__).resolve().parent
TABLE = TESTS.parent / "docs" / "models.md"
PACKAGES = ("torch", "transformers", "timm")
# Of each section: {(file of tests, test): what its column is called}.
COLUMNS = {
    "transformers": {
        ("test_transformers", "test_forward_and_gradients"): "forward, gradients",
        ("test_transformers", "test_padding"): "padding",
        ("test_transformers", "test_autocast"): "autocast",
        ("test_transformers", "test_frozen_parameters"): "frozen parameters",
        ("test_transformers", "test_packed_sequences"): "packed",
        ("test_transformers", "test_caches"): "caches",
        ("test_transformers", "test_generate"): "generate",
        ("test_transformers", "test_checkpointing_with_dropout"): "checkpointing, dropout",
        ("test_transformers", "test_patch"): "patch",
        ("test_transformers_compile", "test_forward_and_gradients"): "compiled",
    },
    "timm": {("test_timm", "test_models"): "forward, gradients", ("test_timm", "test_autocast"): "autocast"},
    "nanogpt": {("test_nanogpt", "test_models"): "forward, gradients, autocast"},
}
TITLES = {
    "transformers": 'transformers, `attn_implementation="tfkern"`',
    "timm": "timm, `attn_layer=tfkern.integrations.timm.Attention` and `tfkern.patch(model)`",
    "nanogpt": "nanoGPT and minGPT, `tfkern.integrations.nanogpt.CausalSelfAttention` and `tfkern.patch(model)`",
}
TESTED = [place for places in COLUMNS.values() for place in places]
IGNORING = ("test_transformers_register", "test_a_model_that_ignores_it_is_told")
FILES = [TESTS / f"{module}.py" for module in dict.fromkeys(module for module, _ in [*TESTED, IGNORING])]
Cells = Counter  # {(module, test, model): cases that passed}


def model_of(params: dict) -> str | None:
    """The model that a test's parameters name."""
    x = params.get("m", params.get("name"))
    return None if x is None else str(x)


def expected() -> Cells:
    """The cases that there are, by the tests' own parameters."""
    cells = Cells()
    for module, test in [*TESTED, IGNORING]:
        sets = [_named(mark) for mark in getattr(_loaded(module), test).pytestmark if mark.name == "parametrize"]
        for chosen in itertools.product(*sets):
            cells[module, test, model_of(dict(itertools.chain(*(x.items() for x in chosen))))] += 1
    return cells


@functools.cache
def _loaded(name: str):
    """A module of tests, of our own."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_the_table", TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _named(mark) -> list[dict]:
    """The sets of parameters of one parametrize."""
    names, found = mark.args[0], []
    for x in mark.args[1]:
        values = x.values if hasattr(x, "marks") else (x,) if isinstance(names, str) else x  # of pytest.param, or bare
        found.append(dict(zip((names,) if isinstance(names, str) else names, values, strict=True)))
    return found


class Collector:
    """A plugin of pytest: counts, for each model and test, the cases that passed, and keeps those that didn't."""

    def __init__(self):
        self.cells, self.failed = Cells(), []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call":
            model = model_of(item.callspec.params) if hasattr(item, "callspec") else None
            self.cells[item.path.stem, item.originalname, model] += report.passed
        if not report.passed:
            self.failed.append(item.nodeid)
        return report


def render(cells: Cells, versions: dict[str, str]) -> str:
    """The page."""
    lines = [
        "# Models that work",
        "",
        "Written by `tests/models_table.py` from the results of the tests, with "
        + ", ".join(f"{name} {version}" for name, version in versions.items()) + ", on a CPU.",
        "Each model is tiny and has random weights. The tests compare it with the same model under the library's own unfused attention:",
        "the output, and the gradient of every parameter, within the error bound that the README states. A cell has ✓ and the number of",
        "cases that passed. It is empty where the model has no such feature.",
        "",
    ]  # fmt: skip
    for section, places in COLUMNS.items():
        lines += [f"## {TITLES[section]}", "", *_table(cells, places), ""]
    ignoring = sorted(model for module, test, model in cells if (module, test) == IGNORING)
    lines += [
        "The columns:",
        "",
        "- padding: on the right, and on the left.",
        "- packed: sequences told apart by `position_ids`, and by `cu_seq_lens`. OPT and gpt-oss have `cu_seq_lens` only, because their own",
        "  masks don't look at positions.",
        "- caches: dynamic and static, each without padding and with padding on either side, in several steps.",
        "- generate: greedy and by beam search, with a dynamic cache, a static cache and none.",
        "- compiled: forward and gradients under `torch.compile(fullgraph=True)`. gpt-oss is compiled with",
        '  `_experts_implementation="batched_mm"`: its other experts do not compile with any attention.',
        "",
        "## Not by tfkern",
        "",
        f"Some models of transformers compute attention by their own code, and ignore `attn_implementation`: {', '.join(ignoring)}, and those",
        'marked "own" in the table below. With `attn_implementation="tfkern"` they work as without it, and a warning tells so: when the model',
        "is made, or, where it can't be known then, at its first forward pass. Their masks are those of eager attention. The report of",
        "`tfkern.patch(model)` tells so, too.",
        "",
        *models_sweep_table.render(models_sweep.kept()),
    ]
    return "\n".join(lines) + "\n"


def _models(cells: Cells, places) -> list[str]:
    return list(dict.fromkeys(model for *place, model in cells if tuple(place) in places))


def _table(cells: Cells, places: dict[tuple[str, str], str]) -> list[str]:
    models = _models(cells, places)
    lines = ["| model | " + " | ".join(places.values()) + " |", "| --- " * (len(places) + 1) + "|"]
    for model in models:
        counts = [cells.get((*place, model)) for place in places]
        lines.append(f"| {model} | " + " | ".join("" if n is None else f"✓ {n}" if n else "no" for n in counts) + " |")
    return lines


def pins() -> dict[str, str]:
    """The versions that constraints.txt pins."""
    lines = [line.split(";")[0].strip() for line in (TESTS.parent / "constraints.txt").read_text().splitlines()]
    found = dict(line.split("==") for line in lines if "==" in line)
    return {name: found[name] for name in PACKAGES}


def main() -> int:
    collector = Collector()
    pytest.main(["-q", "--no-header", "-c", str(TESTS.parent / "pyproject.toml"), *map(str, FILES)], plugins=[collector])
    cells = Cells({key: n for key, n in collector.cells.items() if key[:2] in [*TESTED, IGNORING]})
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}
    TABLE.write_text(render(cells, versions))
    models = sum(len(_models(cells, places)) for places in [*COLUMNS.values(), [IGNORING]])
    print(f"{TABLE.name}: {models} models, {math.fsum(cells.values()):.0f} cases passed")
    for nodeid in collector.failed:
        print("failed:", nodeid)
    return len(collector.failed)


if __name__ == "__main__":
    sys.exit(main() and 1)
