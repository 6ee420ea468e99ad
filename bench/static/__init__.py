"""What the compilers make of the kernels, without a GPU: compile gates, machine code, the cost model, candidates of tile sizes.

These programs need Triton alone, so that one environment for each version of Triton is enough: `python -m bench.static.NAME` in
the root of a checkout. The wheel does not have them.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if "tfkern" not in sys.modules:  # as bench.static: tfkern/__init__.py would import torch, this stands in for it
    package = types.ModuleType("tfkern")
    package.__path__ = [str(ROOT / "tfkern"), str(ROOT)]  # tfkern.kernels and tfkern.bench are folders of the root
    sys.modules["tfkern"] = package
