"""A user's change of scores, which is written for the kernels in Triton, on PyTorch tensors too: for the backend eager."""

import functools
import types

import torch

# Names of triton.language that a score_mod may use, and what they are on tensors.
_OPERATIONS = {
    **{name: getattr(torch, name) for name in ("abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "log", "log2", "rsqrt")},
    **{name: getattr(torch, name) for name in ("sigmoid", "sin", "sqrt", "zeros_like", "float32", "int32", "int64")},
}  # fmt: skip


def _tensor(x, like):
    return x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=like.dtype, device=like.device)


class _Language:
    """What stands for `tl` while a score_mod runs on tensors."""

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


@functools.lru_cache(maxsize=256)
def as_torch(function):
    """The Python function under a @triton.jit function, with triton.language and other jit functions replaced."""
    python = function.fn
    replaced = {}
    for name in python.__code__.co_names:
        value = python.__globals__.get(name)
        if isinstance(value, types.ModuleType) and value.__name__.startswith("triton.language"):
            replaced[name] = _language
        elif hasattr(value, "fn") and value is not function:
            replaced[name] = as_torch(value)
        elif type(value).__name__ == "constexpr":
            replaced[name] = value.value
    return types.FunctionType(
        python.__code__, {**python.__globals__, **replaced}, python.__name__, python.__defaults__, python.__closure__
    )
