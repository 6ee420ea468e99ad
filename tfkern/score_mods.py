"""Host side of score_mod: names for torch.compile, and a user's Triton functions run on PyTorch tensors, for the backend
eager and the reference. (kernels/score_mods.py has examples.)"""

import functools
import importlib
import itertools
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from tfkern import checks, compat

# Names of triton.language that a score_mod may use, and what they are on tensors.
_OPERATIONS = {
    **{name: getattr(torch, name) for name in ("abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "log", "log2", "rsqrt")},
    **{name: getattr(torch, name) for name in ("sigmoid", "sin", "sqrt", "zeros_like", "float32", "int32", "int64")},
}  # fmt: skip


def _tensor(x, like):
    return x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=like.dtype, device=like.device)


class ScoreMod(tuple):
    """A score_mod with a name: ScoreMod(value, derivative), in the place of the pair. torch.compile needs it on a machine
    with a GPU, where Dynamo takes @triton.jit functions for kernels to be launched and can't pass them on.

    Raises TypeError as attention does for a pair.
    """

    def __new__(cls, value, derivative):
        pair = super().__new__(cls, checks.score_mod((value, derivative)))
        pair.name = name_of(value, derivative)
        return pair

    def __reduce__(self):  # Triton's functions can't be pickled
        return _of_name, (self.name,)


def _of_name(name: str) -> ScoreMod:
    return ScoreMod(*named(name))


_by_name: dict[str, tuple] = {}


@compat.while_tracing
def name_of(*pair) -> str:
    """A name for the pair of a score_mod, for a compiled graph to keep. Another process finds functions of a module's top level
    by it."""
    functions = checks.score_mod(pair)
    name = ",".join(f"{f.fn.__module__}:{f.fn.__qualname__}" for f in functions)
    if _imported(name) != functions:
        name += f"#{next(i for i in itertools.count() if _by_name.get(f'{name}#{i}', functions) == functions)}"
        _by_name[name] = functions
    return name


def named(name: str) -> tuple:
    """The pair that has this name from name_of.

    Raises LookupError where this process doesn't know the name.
    """
    if (pair := _by_name.get(name) or _imported(name)) is None:
        raise LookupError(
            f"score_mod {name} must be a pair of functions of a module's top level to be found in another process"
        )
    return pair


@functools.lru_cache(maxsize=256)
def _imported(name: str) -> tuple | None:
    found = []
    for one in name.split(","):
        module, _, path = one.partition(":")
        try:
            found.append(functools.reduce(getattr, path.split("."), importlib.import_module(module)))
        except (ImportError, AttributeError):
            return None
    return tuple(found)


class _Language:
    """The replacement of `tl` while a score_mod runs on tensors."""

    def __getattr__(self, name: str):
        if name in ("math", "standard"):
            return self
        if name in _OPERATIONS:
            return _OPERATIONS[name]
        raise NotImplementedError(
            f"a score_mod uses tl.{name}, which the backend eager does not know; it knows operators, where, maximum, minimum, "
            f"{', '.join(sorted(_OPERATIONS))}"
        )

    @staticmethod
    def where(condition, x, y):
        return torch.where(condition, x, y)

    @staticmethod
    def maximum(x, y):
        tensor = x if isinstance(x, torch.Tensor) else y
        return torch.maximum(_tensor(x, tensor), _tensor(y, tensor))

    @staticmethod
    def minimum(x, y):
        tensor = x if isinstance(x, torch.Tensor) else y
        return torch.minimum(_tensor(x, tensor), _tensor(y, tensor))


_language = _Language()


class _Module:
    """The replacement of another module, with its jit functions and triton.language replaced."""

    def __init__(self, module: types.ModuleType):
        self._module = module

    def __getattr__(self, name: str):
        return _replaced(getattr(self._module, name))


def _replaced(value):
    if isinstance(value, types.ModuleType):
        return _language if value.__name__.startswith("triton.language") else _Module(value)
    if type(value).__name__ == "constexpr":
        return value.value
    return as_torch(value) if hasattr(value, "fn") and callable(value.fn) else value


@functools.lru_cache(maxsize=256)
def as_torch(function):
    """The Python function under a @triton.jit function, with triton.language and other jit functions replaced."""
    python = function.fn
    names = set(python.__code__.co_names)
    known = {name: _replaced(value) for name, value in python.__globals__.items() if name in names and value is not function}
    closure = None
    if python.__closure__:
        closure = tuple(types.CellType(_replaced(cell.cell_contents)) for cell in python.__closure__)
    return types.FunctionType(python.__code__, {**python.__globals__, **known}, python.__name__, python.__defaults__, closure)


class _Number(torch.Tensor):
    """A tensor whose % and // round towards zero, as they do on a GPU."""

    def __mod__(self, other):
        return torch.fmod(self, other)

    def __floordiv__(self, other):
        return torch.div(self, other, rounding_mode="trunc")


def each_head(function, s: Tensor, sequences: Sequence[int], first: int, i: Tensor, j: Tensor) -> Tensor:
    """One function of a score_mod on scores s (B, H, rows, keys) of these sequences and the heads from `first` on. It runs head
    by head, with numbers for b and h, as in the kernels. i and j broadcast to (rows, keys). The result has the dtype of s."""
    python = as_torch(function)
    i, j = (x.as_subclass(_Number) for x in (i, j))
    values = []
    for b, h in itertools.product(range(s.shape[0]), range(s.shape[1])):
        place = (torch.tensor(n, device=s.device).as_subclass(_Number) for n in (sequences[b], first + h))
        value = torch.as_tensor(python(s[b, h].as_subclass(_Number), *place, i, j), device=s.device)
        values.append(value.as_subclass(torch.Tensor).to(s.dtype).broadcast_to(s.shape[2:]))
    return torch.stack(values).view(s.shape) if values else s
