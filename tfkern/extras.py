"""Optional dependencies: imported where they are used, with an error that says how to get them."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package that only an extra of tfkern installs is not there."""


def require(module: str, extra: str) -> ModuleType:
    """Import a module that an extra of tfkern brings."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this needs {error.name}, which is not installed; get it in tfkern's checkout with: pip install '.[{extra}]'"
        ) from None
