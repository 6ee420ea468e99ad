"""Launching kernels: which architecture a device has, on which its tiles depend, and the call itself."""

import functools
import importlib.util

import torch

from tfkern import interpreter


@functools.cache
def missing() -> str | None:
    """Why Triton can't be used here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install fails in many ways; each is a reason, none is ours to hide
        return f"Triton is installed but does not import: {error!r}"
    return None


@functools.cache
def architecture(device: torch.device) -> str:
    """ "interpreter", "sm_90", "gfx942" … of a device."""
    if interpreter.interpreting():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launch(kernel, grid: int, device: torch.device, *args, **kwargs) -> None:
    """Run grid programs of a kernel on the device's current stream; none if grid is 0."""
    if grid == 0:
        return
    if interpreter.interpreting():
        interpreter.run(kernel, grid, args, kwargs)
    else:
        with torch.cuda.device(device):
            kernel[(grid,)](*args, **kwargs)
