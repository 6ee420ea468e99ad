"""The recipes of README.md that need another library."""

import re
from pathlib import Path


def recipe(library: str) -> str:
    """The one block of code that imports it."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (found,) = [
        block for block in re.findall(r"```py\n(.*?)```", text, re.S) if f"tfkern.integrations.{library} import" in block
    ]
    return found
