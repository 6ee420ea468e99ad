"""Analysis of the compiled kernels without a GPU: compile gates, machine code, the cost model, candidates for tile sizes.

The programs need Triton but not torch, so one environment for each version of Triton is enough. Run them by
`python -m bench.static.NAME` in the root of a checkout. The wheel does not contain them.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if "tfkern" not in sys.modules:  # imported as bench.static: an empty package replaces tfkern/__init__.py, which imports torch
    package = types.ModuleType("tfkern")
    package.__path__ = [str(ROOT / "tfkern"), str(ROOT)]  # tfkern.kernels and tfkern.bench are folders of the root
    sys.modules["tfkern"] = package
