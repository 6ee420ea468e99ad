"""The examples of docs/ and README.md run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


TRAINS = pytest.param("docs/ladder.md", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["docs/features.md", "docs/drop-in.md", TRAINS, "docs/reference-models.md", "README.md"])
def test_examples(name, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)
    assert len(blocks) > 1
    run("\n".join(blocks), tmp_path)


def run(code: str, folder: Path) -> None:
    script = folder / "example.py"  # a file: Triton reads the source of jit functions
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr


RECIPES = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_every_recipe_has_a_test():
    """Those of integrations in the tests of these: recipe() of readme.py."""
    assert sum("tfkern.integrations" not in block for block in RECIPES) == 1
    found = {name for block in RECIPES for name in re.findall(r"tfkern\.integrations\.(\w+) import", block)}
    assert found == {"transformers", "timm", "nanogpt"}


@pytest.mark.slow
def test_the_compiled_recipe(tmp_path):
    """A minute or two of a C++ compiler."""
    (block,) = [block for block in RECIPES if "tfkern.integrations" not in block]
    assert "torch.compile" in block
    run(block, tmp_path)


def test_every_argument_is_told():
    import inspect

    import tfkern

    text = (ROOT / "docs" / "features.md").read_text()
    for function in (tfkern.attention, tfkern.attention_varlen, tfkern.attention_packed):
        assert function.__name__ in text
        for name in inspect.signature(function).parameters:
            assert name in text or name in ("query", "key", "value", "backend", "enable_gqa", "qkv"), name


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = {name for name in re.findall(r"\b(?:tfkern|kernels|bench|tests|docs)/[\w./]*\w/?|\bconstraints[\w-]*\.txt", ARCHITECTURE)
         if "NAME" not in name}  # fmt: skip


def test_every_file_of_the_map_exists():
    assert len(NAMED) > 50
    assert not {name for name in NAMED if not (ROOT / name).exists()}


@pytest.mark.parametrize("folder", ["tfkern", "kernels"])
def test_the_map_has_every_file(folder):
    """Of the first level: modules, and packages as folders."""
    there = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} - {f"{folder}/__init__.py"}
    there |= {f"{folder}/{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py")}
    assert not there - NAMED
