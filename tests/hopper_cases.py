"""What the tests of the Gluon kernels for Hopper share: problems, the simulator in the place of a GPU, kernels with a fault."""

import importlib.util
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import call, dropout, launch, testing, tiles
from tfkern.backends import hopper
from tfkern.problem import lse_of

sys.path.append(str(Path(__file__).resolve().parent))
from gluonsim import simulate

SCHEDULES = [("eager", 0), ("lazy", 0), ("random", 0), ("random", 1), ("random", 2)]
EXTRA = [
    testing.Case("several-tiles", 2, 300, 64),
    testing.Case("several-tiles-causal", 2, 460, 64, kv_heads=1, options=testing.CAUSAL),
    testing.Case("many-heads", 12, 300, 64, kv_heads=6, options=testing.CAUSAL),
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
    testing.Case("d256-causal", 2, 260, 256, options=testing.CAUSAL),
    testing.Case("d192", 1, 70, 192, n_k=200),
    testing.Case("packed-long", 2, 0, 64, kv_heads=1, lengths=((140, 0, 77, 200), (140, 30, 150, 0)), options=testing.CAUSAL),
    testing.Case("packed-window", 2, 0, 40, lengths=((90, 5), (130, 170)), options=dict(window=(60, 20))),
    testing.Case("hidden-keys", 2, 150, 64, mask="bool 1h1k", options=dict(window=(90, 40))),
    testing.Case("bias-wide", 2, 70, 128, n_k=130, kv_heads=1, batch=2, mask="query b1qk", options=testing.CAUSAL),
    testing.Case("softcap-causal", 2, 200, 64, options=dict(softcap=3.0, **testing.CAUSAL)),
    testing.Case("slopes-sinks", 2, 150, 64, slopes="h", sinks=True, options=testing.CAUSAL),
    testing.Case(
        "everything",
        4,
        0,
        64,
        kv_heads=2,
        lengths=((140, 3), (140, 80)),
        slopes="bh",
        sinks=True,
        score_mod="signed_log",
        options=dict(softcap=5.0, dropout_p=0.2, window=(70, 30)),
    ),
]
CASES = {case.name: case for case in (*testing.CASES, *testing.FEATURE_CASES, *EXTRA)}


@contextmanager
def simulated(schedule="lazy", seed=0):
    """The simulator in the place of Triton's JIT, to which launches go without a detour."""
    with simulate(schedule, seed) as simulation, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launch, "__call__", lambda self, features, _, **tensors: self.by_jit(features, **tensors))
        yield simulation


def built(case, dtype):
    inputs = testing.make_inputs(case, dtype)
    problem, tensors = call.build(**inputs.tensors, enable_gqa=True, **inputs.options)
    if problem.dropout_p:
        with torch.random.fork_rng():
            torch.manual_seed(1234)  # as budget.results
            tensors = tensors._replace(seed=dropout.draw_seed(problem.device))
    return inputs, (problem, tensors)


# What `make test` simulates: each feature, layout and head dim once, and what killed mutants (tests/mutation/cover.py).
QUICK = {
    "full", "one-query", "one-key", "causal-wide", "window-lower-right", "padded", "padded-causal", "mqa-causal", "d80", "d128",
    "d256", "d256-causal", "layout-bnhd", "layout-strided", "bool-mask", "bias", "bias-of-keys", "dropout", "packed-slopes",
    "packed-bias-dropout", "softcap", "slopes", "sinks", "score-mod", "everything", "several-tiles-causal", "many-heads", "cut-inside",
    "window-of-many-tiles", "packed-long", "hidden-keys", "groups", "many-items", "all-slots-again", "dead-keys-first",
}  # fmt: skip


def slow_but(quick, values: list[tuple]) -> list:
    """Parameters of a test; `make test` runs those of which quick(*value) is true."""
    return [pytest.param(*value, marks=[pytest.mark.slow] * (not quick(*value))) for value in values]


def mostly_slow(values: list[tuple], quick: int) -> list:
    """Parameters of a test, of which `make test` runs one in `quick`."""
    return [value if i % quick == 0 else pytest.param(*value, marks=pytest.mark.slow) for i, value in enumerate(values)]


TYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "fp16"]
)


def forward(case, problem, tensors):
    """By the kernel, in the shapes of the public functions."""
    out, stats = hopper.forward(problem, tensors)
    lse = lse_of(stats, problem.unit(tensors))
    return (out.squeeze(0).transpose(0, 1), lse.squeeze(0)) if case.lengths else (out, lse)


@contextmanager
def only(form: str, **changes):
    """The forward's problems of head dim 64 by one of its two kernels, wherever they are no others'; flash_fwd_short's tiles
    may be changed."""
    short = replace(tiles.HOPPER[64].short, **changes)
    some = dict(short=None) if form == "flash_fwd" else dict(usual=(), heavy=(), short=short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.HOPPER, 64, tiles.HOPPER[64]._replace(**some))
        patch.setattr(call, "_problems", {})  # they keep launches
        yield


def tight(case) -> int:
    """No more stages than flash_fwd_short needs, so that buffers are soon used again."""
    return max(2, -(-(case.n_k or case.n_q) // 64))


def _may_be_short(case) -> bool:
    with only("flash_fwd_short"):
        try:
            return hopper._config(built(case, torch.bfloat16)[1][0])[1]
        except ValueError:  # of no tiles the fastest
            return False


SUPPORTED = [name for name, case in CASES.items() if not hopper.limits(built(case, torch.bfloat16)[1][0])]

SHORT = [name for name in SUPPORTED if _may_be_short(CASES[name])]

KERNELS = Path(tfkern.__file__).resolve().parent.parent / "kernels" / "hopper"
SYNCHRONISES = re.compile(r"\b(mbarrier\.\w+|fence_async_shared|tma\.store_wait|warpgroup_mma_wait|meet|\w+_turns?)\(")


def lines(name: str) -> list[str]:
    """The source of a kernel."""
    return (KERNELS / f"{name}.py").read_text().splitlines()


def faults(name: str) -> list[int]:
    """The lines of a kernel that synchronise."""
    return [n for n, line in enumerate(lines(name)) if line.startswith("    ") and SYNCHRONISES.search(line)]


def without(name: str, part: str, line: int, folder: Path):
    """A kernel without one line of a source: its own, or that of a part that it imports."""
    source = lines(part)
    indent = len(source[line]) - len(source[line].lstrip())
    source[line] = " " * indent + "pass"
    changed = _module(f"{part}_without_{line}", source, folder)
    if part == name:
        return getattr(changed, name)
    source = [x.replace(f"from .{part} import", f"from .{part}_without_{line} import") for x in lines(name)]
    return getattr(_module(f"{name}_with_{part}_without_{line}", source, folder), name)


def _module(name: str, source: list[str], folder: Path):
    """A module beside the kernels, from text."""
    path = folder / f"{name}.py"
    path.write_text("\n".join(source) + "\n")
    spec = importlib.util.spec_from_file_location(f"tfkern.kernels.hopper.{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
