"""What timm imports of torchvision, which has no use here and no CPU build for every torch: names that lead to nothing."""

import contextlib
import enum
import importlib
import sys
import types

NAMES = ["torchvision", *(f"torchvision.{x}" for x in ("datasets", "ops", "ops.misc", "transforms", "transforms.functional"))]


class _Nothing:
    """Any class or function of torchvision: there to be named."""

    def __init_subclass__(cls, **options):
        pass


class _Modes(enum.Enum):
    NEAREST, NEAREST_EXACT, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(7)


class _Module(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Modes if name == "InterpolationMode" else _Nothing


def _there() -> bool:
    try:
        importlib.import_module("torchvision")
    except Exception:
        return False
    return True


@contextlib.contextmanager
def installed():
    """For a block, unless torchvision is there and can be imported (a CUDA build can't beside a CPU build of torch). Afterwards
    nobody finds it, and who has imported from it keeps what they have."""
    if _there():
        yield
        return
    for name in NAMES:
        sys.modules[name] = _Module(name)
        sys.modules[name].__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in NAMES:
            del sys.modules[name]
