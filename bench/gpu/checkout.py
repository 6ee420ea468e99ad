#!/usr/bin/env python3
"""Run Python with tfkern as it is in this checkout, without installing it: nothing is built, and no package is needed.

usage: python bench/gpu/checkout.py [ARGUMENTS OF PYTHON …], such as: python bench/gpu/checkout.py -m tfkern.bench.gpu --call 1

In the checkout, device code and benchmarks lie beside the package, not in it (setup.py says why). So the package is assembled
from symbolic links in a temporary folder. That folder is the working directory of the command, and first on PYTHONPATH for all
processes that it starts.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def package(folder: Path) -> None:
    """Make the package tfkern in `folder`, from symbolic links to its parts in the checkout."""
    inside = folder / "tfkern"
    inside.mkdir()
    parts = [path for path in (ROOT / "tfkern").iterdir() if path.name != "__pycache__"]
    for path in (*parts, ROOT / "kernels", ROOT / "bench"):
        (inside / path.name).symlink_to(path)


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix="tfkern-checkout-"))
    package(folder)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
