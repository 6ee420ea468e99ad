"""What the tests of the Gluon kernels for Hopper share: problems, the simulator in the place of a GPU, kernels with a fault."""

import importlib.util
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import call, launch, testing
from tfkern.backends import hopper

sys.path.append(str(Path(__file__).resolve().parent))
from gluonsim import simulate

SCHEDULES = [("eager", 0), ("lazy", 0), ("random", 0), ("random", 1), ("random", 2)]
EXTRA = [
    testing.Case("several-tiles", 2, 300, 64),
    testing.Case("several-tiles-causal", 2, 460, 64, kv_heads=1, options=testing.CAUSAL),
    testing.Case("wide-causal", 1, 150, 128, n_k=290, options=dict(testing.CAUSAL, causal_alignment="lower_right")),
    testing.Case("cut-inside", 1, 100, 64, n_k=200, options=testing.CAUSAL),
    testing.Case(
        "padded-causal",
        2,
        140,
        64,
        n_k=200,
        batch=3,
        options=dict(testing.CAUSAL, key_lengths=(200, 0, 71), causal_alignment="lower_right"),
    ),
    testing.Case("window-of-many-tiles", 1, 420, 64, options=dict(window=(150, 40))),
]
CASES = {case.name: case for case in (*testing.CASES, *testing.FEATURE_CASES, *EXTRA)}


@contextmanager
def simulated(schedule="lazy", seed=0):
    """The simulator in the place of Triton's JIT, to which launches go without a detour."""
    with simulate(schedule, seed) as simulation, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launch, "__call__", lambda self, tensors, features, _: self.by_jit(tensors, features))
        yield simulation


def built(case, dtype):
    inputs = testing.make_inputs(case, dtype)
    return inputs, call.build(**inputs.tensors, enable_gqa=True, **inputs.options)


SUPPORTED = [name for name, case in CASES.items() if not case.lengths and not hopper.limits(built(case, torch.bfloat16)[1][0])]

KERNELS = Path(tfkern.__file__).parent.parent / "kernels" / "hopper"
SYNCHRONISES = re.compile(r"\b(mbarrier\.\w+|fence_async_shared|tma\.store_wait|warpgroup_mma_wait|\w+_turns?)\(")


def lines(name: str) -> list[str]:
    """The source of a kernel."""
    return (KERNELS / f"{name}.py").read_text().splitlines()


def faults(name: str) -> list[int]:
    """The lines of a kernel that synchronise."""
    return [n for n, line in enumerate(lines(name)) if line.startswith("    ") and SYNCHRONISES.search(line)]


def without(name: str, line: int, folder: Path):
    """The kernel, one line of its source taken out."""
    source = lines(name)
    indent = len(source[line]) - len(source[line].lstrip())
    source[line] = " " * indent + "pass"
    path = folder / f"without_{line}.py"
    path.write_text("\n".join(source) + "\n")
    spec = importlib.util.spec_from_file_location(f"tfkern.kernels.hopper.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
