"""Turns Gluon functions into Python functions that call the simulated builtins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CellType, FunctionType, ModuleType
from typing import Any

from triton.experimental.gluon import language as gl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .errors import UnsupportedError

_BUILTIN_MARK = "__triton_builtin__"
KERNELS = (JITFunction, InterpretedFunction)  # the second where Triton's own interpreter is on


class _ModuleProxy:
    """A Triton module, with its attributes translated on first use."""

    def __init__(self, module: ModuleType, translate: Callable[[Any], Any]):
        self._module = module
        self._translate = translate

    def __getattr__(self, name: str) -> Any:
        value = self._translate(getattr(self._module, name))
        setattr(self, name, value)
        return value


class Frontend:
    """Translates what a kernel's globals refer to.

    ``namespaces`` hold the simulated builtins: a builtin of a Gluon module is looked up in the namespace of that
    module's name, or else in the one named ``language``.  ``builtins`` names the simulated builtin, as in
    ``"tma.async_load"``, for builtins that a kernel's authors have defined themselves.
    """

    def __init__(self, namespaces: Mapping[str, Any], builtins: Mapping[Any, str]):
        self._namespaces = namespaces
        self._builtins = builtins
        self._functions: dict[Callable, FunctionType] = {}
        self._globals: dict[int, dict[str, Any]] = {}

    def translate(self, value: Any) -> Any:
        if isinstance(value, ModuleType):
            return _ModuleProxy(value, self.translate) if _belongs_to_triton(value.__name__) or _has_kernels(value) else value
        if isinstance(value, KERNELS):
            simulated = self._simulated(value.fn) if _belongs_to_triton(value.fn.__module__) else None
            return simulated or self.function(value)
        if value is gl.static_range or getattr(value, _BUILTIN_MARK, False):
            return self._simulated(value) or _unsupported(value)
        if value is gl.constexpr:
            return _unwrap
        return _unwrap(value)

    def function(self, jit_function: JITFunction) -> FunctionType:
        """The Python function behind a Gluon function, with its globals translated."""
        source = jit_function.fn
        if source not in self._functions:
            closure = source.__closure__ and tuple(CellType(self.translate(cell.cell_contents)) for cell in source.__closure__)
            defaults = source.__defaults__ and tuple(map(_unwrap, source.__defaults__))
            self._functions[source] = FunctionType(
                source.__code__, self._translated_globals(source), source.__name__, defaults, closure
            )
        return self._functions[source]

    def _translated_globals(self, function: FunctionType) -> dict[str, Any]:
        original = function.__globals__
        if id(original) not in self._globals:
            translated = self._globals[id(original)] = {}
            translated.update((name, self.translate(value)) for name, value in original.items())
        return self._globals[id(original)]

    def _simulated(self, builtin: Any) -> Callable | None:
        module_name, name = self._builtins.get(builtin, f"{builtin.__module__}.{builtin.__name__}").rsplit(".", 1)
        namespace = self._namespaces.get(module_name.rsplit(".", 1)[-1], self._namespaces["language"])
        return getattr(namespace, name, None)


def _belongs_to_triton(module_name: str) -> bool:
    return module_name.partition(".")[0] == "triton"


def _has_kernels(module: ModuleType) -> bool:
    return any(isinstance(value, KERNELS) for value in vars(module).values())


def _unwrap(value: Any) -> Any:
    return value.value if isinstance(value, gl.constexpr) else value


def _unsupported(builtin: Any) -> Callable:

    def fail(*args, **kwargs):
        raise UnsupportedError(f"{builtin.__module__}.{builtin.__name__} is not simulated")

    return fail
