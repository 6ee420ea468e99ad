"""Check every backend that works here against the float64 oracle, forward and backward, error beside budget."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tfkern import call, launch, testing
from tfkern.backends import BACKENDS, order
from tfkern.testing import SHORT

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_arguments(parser) -> None:
    parser.add_argument("--full", action="store_true", help="all cases instead of a selection")


def run(args) -> int:
    """Print a line for each case, backend and dtype; 1 if any error is beyond its budget."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in (*testing.CASES, *testing.FEATURE_CASES) if args.full or case.name in SHORT]
    if launch.missing():
        print(f"left out, since {launch.missing()}: {', '.join(map(str, filter(testing.needs_triton, cases)))}")
        cases = [case for case in cases if not testing.needs_triton(case)]
    print(f"{'case':20} {'backend':9} {'dtype':9} " + " ".join(f"{q + ' error/budget':>21}" for q in QUANTITIES))
    failed = total = 0
    for result in results(cases, backends(device), DTYPES, device):
        print(result, flush=True)
        total += 1
        failed += not result.ok
    print(f"{total - failed} passed, {failed} failed")
    return 1 if failed else 0


QUANTITIES = ("out", "lse", "dq", "dk", "dv")  # of every case; others stand behind with their names


@dataclass(frozen=True)
class Result:
    """One case by one backend in one dtype."""

    case: testing.Case
    backend: str
    dtype: torch.dtype
    errors: list[testing.Error]

    @property
    def ok(self) -> bool:
        return all(e.ok for e in self.errors)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        figures = " ".join(
            f"{'' if e.quantity in QUANTITIES else e.quantity}{e.error:>10.1e}/{e.budget:.1e}{' ' if e.ok else '!'}  "
            for e in self.errors
        )
        return f"{self.case.name:20} {self.backend:9} {dtype:9} {figures}{'' if self.ok else 'WRONG'}"


def backends(device: torch.device) -> list[str]:
    """The backends that work on a device."""
    q = torch.empty(1, 1, 1, 16, device=device)
    return [name for name in order(device.type) if not BACKENDS[name].unsupported(call.build(q, q, q)[0])]


def results(cases: Iterable[testing.Case], names: Iterable[str], dtypes, device) -> Iterator[Result]:
    """Check each case by each backend in each dtype."""
    for case in cases:
        for name in names:
            for dtype in dtypes:
                yield Result(case, name, dtype, testing.check(case, dtype, name, device))
