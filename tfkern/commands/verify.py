"""Check every backend that works here against the float64 oracle, forward and backward, and print errors beside budgets."""

import itertools
from dataclasses import dataclass

import torch

import tfkern
from tfkern import call, launch, testing
from tfkern.backends import BACKENDS, order
from tfkern.commands.tables import width
from tfkern.progress import counted
from tfkern.testing import SHORT
from tfkern.training.provenance import label

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTITIES = ("out", "lse", "dq", "dk", "dv")  # that every case has; others follow with their names
HEADING = f"{'case':20} {'backend':9} {'dtype':9} " + " ".join(f"{q + ' error/budget':>21}" for q in QUANTITIES)


def add_arguments(parser) -> None:
    parser.add_argument("--full", action="store_true", help="all cases instead of a selection")


def run(args) -> int:
    """Print a line for each case, backend and dtype. The exit status: 0, or 1 if any error exceeds its budget."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in (*testing.CASES, *testing.FEATURE_CASES) if args.full or case.name in SHORT]
    if launch.missing():
        print(f"left out, since {launch.missing()}: {', '.join(map(str, filter(testing.needs_triton, cases)))}")
        cases = [case for case in cases if not testing.needs_triton(case)]
    names, columns = backends(device), width()
    print(
        f"tfkern {tfkern.__version__}, torch {torch.__version__}, backends {', '.join(label(n, device) for n in names)}",
        flush=True,
    )
    if len(HEADING) <= columns:
        print(HEADING, flush=True)
    asked, found = itertools.product(cases, names, DTYPES), []
    for case, backend, dtype in counted(asked, lambda one: " ".join(map(str, one))):
        found.append(checked(case, backend, dtype, device))
        print(found[-1].text(columns), flush=True)
    failed = sum(not result.ok for result in found)
    print(f"{len(found) - failed} passed, {failed} failed")
    return 1 if failed else 0


@dataclass(frozen=True)
class Result:
    """The errors of one case, computed by one backend in one dtype."""

    case: testing.Case
    backend: str
    dtype: torch.dtype
    errors: list[testing.Error]

    @property
    def ok(self) -> bool:
        return all(e.ok for e in self.errors)

    def text(self, columns: int) -> str:
        """A line with errors and budgets under HEADING. If HEADING is wider than `columns` characters, a line for each
        quantity."""
        names = f"{self.case.name:20} {self.backend:9} {str(self.dtype).removeprefix('torch.'):9}"
        if columns < len(HEADING):
            figures = (f"  {e.quantity:9} {e.error:.1e}/{e.budget:.1e}{'' if e.ok else ' WRONG'}" for e in self.errors)
            return "\n".join([" ".join(names.split()), *figures])
        figures = (
            f"{'' if e.quantity in QUANTITIES else e.quantity}{e.error:>10.1e}/{e.budget:.1e}{' ' if e.ok else '!'}  "
            for e in self.errors
        )
        return f"{names} {' '.join(figures)}{'' if self.ok else 'WRONG'}"


def backends(device: torch.device) -> list[str]:
    """The names of the backends that work on a device, gradients included."""
    q = torch.empty(1, 1, 1, 16, device=device)
    return [name for name in order(device.type) if not BACKENDS[name].unsupported(call.build(q, q, q)[0], needs_grad=True)]


def checked(case: testing.Case, backend: str, dtype: torch.dtype, device: torch.device) -> Result:
    """The result of checking a case, computed by a backend in a dtype on a device."""
    return Result(case, backend, dtype, testing.check(case, dtype, backend, device))
