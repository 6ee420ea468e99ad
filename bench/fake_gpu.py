"""A stand-in for a GPU: kernels are compiled for it, and launches do nothing.

With it the Python side of a launch can be timed, and what compiles anew be counted, on a machine without a GPU. Tensors are the
CPU's; results are whatever memory held. RuntimeError where Triton's interpreter is on.
"""

import os
import types

from tfkern import compat_triton

PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    """What Triton asks of a driver before a launch, and a launcher that returns at once."""

    utils = types.SimpleNamespace(
        load_binary=lambda *_: (1, 2, 100, 0, 1024), unload_module=lambda *_: None, get_device_properties=lambda _: PROPERTIES
    )  # fmt: skip

    def __init__(self, architecture: int, launcher):
        self.architecture, self.launcher = architecture, launcher

    def launcher_cls(self, src, metadata):
        return self.launcher

    def get_current_target(self):
        return compat_triton.target("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        return None

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def pretend(architecture: int = 90, launcher=lambda *_: None) -> None:
    """For the rest of the process, the backends for GPUs take CPU tensors as a GPU's, and call `launcher` in place of CUDA.
    Call it before the first attention."""
    install(Driver(architecture, launcher))


def install(stand_in: Driver) -> None:
    """The same, with a driver of one's own."""
    from tfkern import interpreter, launch

    if interpreter.interpreting():
        raise RuntimeError("TRITON_INTERPRET is on: kernels would be interpreted, not launched; run without it")
    launch.architecture = lambda device: f"sm_{stand_in.architecture}"
    launch.unsupported = lambda device: []
    launch.multiprocessors = lambda device: PROPERTIES["multiprocessor_count"]  # on which tiles depend
    os.environ["TFKERN_BACKENDS"] = "portable"  # on a GPU it is the first
    compat_triton.driver().set_active(stand_in)
