"""Optional dependencies, imported where they are used. The error for a missing one says how to install it."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package that an extra of tfkern installs is missing."""


def require(module: str, extra: str) -> ModuleType:
    """Import a module that an extra of tfkern installs. Raises MissingExtraError."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this needs {error.name}, which is not installed; get it in tfkern's checkout with: pip install '.[{extra}]'"
        ) from None
