"""F.scaled_dot_product_attention for the whole process: put in its place, and back."""

import contextlib
import sys
import threading

import torch.nn.functional as F

from tfkern import compat
from tfkern.integrations import replay, torch_sdpa

NAME = "scaled_dot_product_attention"


class _Service:
    """Who wants ours, and where it stands."""

    def __init__(self):
        self.lock = threading.RLock()
        self.always = False  # patch() was called
        self.blocks = 0  # `with patched():` that are open, in any thread
        self.replaced = None  # what stood in torch.nn.functional
        self.places: list[tuple[dict, str, str]] = []  # a namespace, the name there, and both as text


_service = _Service()
_replay = threading.local()  # blocks: in this thread, where that holds, whoever else wants ours


def dispatcher(*args, **kwargs):
    """What stands in the place of PyTorch's function. Whoever imported it by name meanwhile has PyTorch's again afterwards."""
    return (torch_sdpa.scaled_dot_product_attention if serving() else torch_sdpa.PYTORCHS)(*args, **kwargs)


def serving() -> bool:
    """Whether somebody wants ours, of whom this thread is to know."""
    return bool(getattr(_replay, "blocks", _service.always or _service.blocks))


def serve(block: bool) -> list[str]:
    """Serve from now on, or in one more block. Returns every name that leads to tfkern now."""
    with _service.lock:
        if not (block and _service.places):
            _install()
        if block:
            _count(1)
        else:
            _service.always = True
        replay.note(_service, serving, _as_then)
        return [text for *_, text in _service.places]


def stop(block: bool) -> list[str]:
    """Stop serving, or end a block. Returns the names that lead to PyTorch's function again: none while others want ours."""
    with _service.lock:
        if block:
            _count(-1)
        else:
            _service.always = False
        if _service.always or _service.blocks:
            return []
        restored = []
        for namespace, name, text in _service.places:
            if namespace.get(name) is dispatcher:  # else someone has put another in its place since
                namespace[name] = _service.replaced
                restored.append(text)
        _service.places.clear()
        replay.forget(_service)
        return restored


def _count(blocks: int) -> None:
    _service.blocks += blocks
    if hasattr(_replay, "blocks"):
        _replay.blocks += blocks


@contextlib.contextmanager
def _as_then(served: bool):
    """A replay of what was served, or was not."""
    before = vars(_replay).copy()
    _replay.blocks = 0
    if served:
        serve(block=True)
    try:
        yield
    finally:
        if served:
            stop(block=True)
        vars(_replay).clear()
        vars(_replay).update(before)


def _install() -> None:
    """Ours in torch.nn.functional, and in every module outside torch that imported the function by name: a look at all names of
    all modules, some milliseconds."""
    compat.scripted_as(dispatcher, "aten::scaled_dot_product_attention")
    if getattr(F, NAME) is not dispatcher:
        _service.replaced = getattr(F, NAME)
        _put(vars(F), NAME, f"torch.nn.functional.{NAME}")
    for module_name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if module_name.split(".")[0] in ("torch", "tfkern") or not isinstance(namespace, dict):
            continue
        for name in [name for name, x in list(namespace.items()) if x is _service.replaced]:
            _put(namespace, name, f"{module_name}.{name}")


def _put(namespace: dict, name: str, text: str) -> None:
    namespace[name] = dispatcher
    _service.places.append((namespace, name, text))
