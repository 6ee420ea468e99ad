"""docs/models.md is what tests/models_table.py writes when every test of a model passes, which the other files see to."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import models_table


def test_the_table_is_current():
    want = models_table.render(models_table.expected(), models_table.pins())
    assert models_table.TABLE.read_text() == want, "run: python tests/models_table.py"


def test_what_fails_shows():
    cells = models_table.expected()
    key = next(iter(cells))
    cells[key] = 0
    assert "| no |" in models_table.render(cells, {})


def test_every_file_of_the_page_is_run():
    assert {path.stem for path in models_table.FILES} == {module for module, _, _ in models_table.expected()}
