"""Print versions, the device, which backends work here and why the others don't, and a self-check."""

import importlib.metadata
import platform

import torch

import tfkern
from tfkern import call, testing
from tfkern.backends import BACKENDS, order

SELF_CHECK = testing.Case("self-check", 2, 65, 64, n_k=80, options=testing.CAUSAL)


def add_arguments(parser) -> None:
    pass


def run(args) -> int:
    """Print the information. The exit status: 0, or 1 if a backend that claims to work gives wrong results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"tfkern   {tfkern.__version__}\nPython   {platform.python_version()} on {platform.platform()}")
    print(f"torch    {torch.__version__}\nTriton   {_version('triton')}\ndevice   {describe(device)}\n")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q = torch.empty(1, 2, 64, 64, dtype=dtype, device=device)
    problem = call.build(q, q, q, is_causal=True)[0]
    wrong = 0
    for name in order(device.type):
        if reasons := BACKENDS[name].unsupported(problem, needs_grad=True):
            print(f"{name:9} does not work here: {'; '.join(reasons)}")
            continue
        errors = testing.check(SELF_CHECK, dtype, name, device)
        bad = [e for e in errors if not e.ok]
        wrong += bool(bad)
        print(f"{name:9} {'WRONG' if bad else 'works'}; self-check forward and backward against the float64 oracle, {dtype}:")
        print("".join(f"            {e}\n" for e in errors), end="")
    print(f"\nby default {tfkern.backends.explain(problem).splitlines()[0]}")
    return 1 if wrong else 0


def describe(device: torch.device) -> str:
    """A line that describes a device."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s'[: threads > 1]} (no GPU: the Triton kernels run in Triton's interpreter only)"
    p = torch.cuda.get_device_properties(device)
    return f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
