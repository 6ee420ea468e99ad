"""The examples of docs/ and README.md run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["docs/features.md", "docs/drop-in.md", "README.md"])
def test_examples(name, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)
    assert len(blocks) > 1
    script = tmp_path / "example.py"  # a file: Triton reads the source of jit functions
    script.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_argument_is_told():
    import inspect

    import tfkern

    text = (ROOT / "docs" / "features.md").read_text()
    for function in (tfkern.attention, tfkern.attention_varlen, tfkern.attention_packed):
        assert function.__name__ in text
        for name in inspect.signature(function).parameters:
            assert name in text or name in ("query", "key", "value", "backend", "enable_gqa", "qkv"), name
