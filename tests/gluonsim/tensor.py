"""Register values: tensors with Triton's type promotion, and pointers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace

import torch
from triton.experimental.gluon import language as gl

_TORCH_OF_GLUON = {
    "int1": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_GLUON_OF_TORCH = {torch_dtype: gl.dtype(name) for name, torch_dtype in _TORCH_OF_GLUON.items()}


def torch_dtype(dtype: gl.dtype) -> torch.dtype:
    return _TORCH_OF_GLUON[dtype.name]


def gluon_dtype(dtype: torch.dtype) -> gl.dtype:
    return _GLUON_OF_TORCH[dtype]


class Tensor:
    """An immutable register tensor, or a scalar where the shape is empty.  Layouts are not tracked."""

    def __init__(self, data: torch.Tensor):
        self._data = data

    @property
    def data(self) -> torch.Tensor:
        return self._data

    @property
    def dtype(self) -> gl.dtype:
        return gluon_dtype(self._data.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._data.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None, scalar=self.dtype, shape=self.shape)

    def to(self, dtype: gl.dtype) -> Tensor:
        return Tensor(self.data.to(torch_dtype(dtype)))

    def __getitem__(self, index) -> Tensor:
        """Only ``None`` and ``:`` can index, as in Triton."""
        return Tensor(self.data[index])

    def __index__(self) -> int:
        return int(self.data)

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __neg__(self) -> Tensor:
        return Tensor(-self.data)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data)

    def __repr__(self) -> str:
        return f"Tensor({self._data!r})"

    __hash__ = None


class Pointer:
    """A block of addresses, or one: element offsets into one global tensor."""

    def __init__(self, base: torch.Tensor, offsets: torch.Tensor):
        self.base = base
        self.offsets = offsets

    @classmethod
    def to_tensor(cls, tensor: torch.Tensor) -> Pointer:
        """A pointer to the tensor's first element, from which all of its elements can be reached."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.as_strided((extent,), (1,)), torch.zeros((), dtype=torch.int64))

    @property
    def dtype(self) -> gl.pointer_type:
        return gl.pointer_type(gluon_dtype(self.base.dtype))

    @property
    def in_bounds(self) -> torch.Tensor:
        return (self.offsets >= 0) & (self.offsets < self.base.numel())

    def __add__(self, offset: Tensor | int) -> Pointer:
        step = offset.data.long() if isinstance(offset, Tensor) else offset
        return Pointer(self.base, self.offsets + step)

    __radd__ = __add__


def as_tensor(value: Tensor | bool | int | float) -> Tensor:
    """The value as Triton types it when it becomes an operand: int32 where it fits, float32."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        return Tensor(torch.tensor(value))
    if isinstance(value, int):
        return Tensor(torch.tensor(value, dtype=torch.int32 if -(2**31) <= value < 2**31 else torch.int64))
    return Tensor(torch.tensor(value, dtype=torch.float32))


def promote(left, right, *, dividing: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands in the type Triton computes in: Python numbers give way to tensors, scalar tensors do not."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape and right.shape and len(left.shape) != len(right.shape):
            raise ValueError(f"cannot broadcast {left.shape} with {right.shape}: the ranks differ")
        dtype = torch.promote_types(left.data.dtype, right.data.dtype)
    elif not isinstance(left, Tensor) and not isinstance(right, Tensor):
        return promote(as_tensor(left), as_tensor(right), dividing=dividing)
    else:
        tensor, number = (left, right) if isinstance(left, Tensor) else (right, left)
        dtype = tensor.data.dtype
        if _kind(number) > _dtype_kind(dtype):
            dtype = as_tensor(number).data.dtype
    if dividing and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    return tuple(x.data.to(dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype) for x in (left, right))


def _kind(number: bool | int | float) -> int:
    return 0 if isinstance(number, bool) else 1 if isinstance(number, int) else 2


def _dtype_kind(dtype: torch.dtype) -> int:
    return 0 if dtype is torch.bool else 2 if dtype.is_floating_point else 1


def _true_divide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left / right


def _floor_divide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.div(left, right, rounding_mode="trunc")


_ARITHMETIC: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
_DIVISION: dict[str, Callable] = {"truediv": _true_divide, "floordiv": _floor_divide, "mod": torch.fmod}
_COMPARISON: dict[str, Callable] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}


def _define_operator(name: str, function: Callable, *, dividing: bool = False) -> None:

    def forward(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        return Tensor(function(*promote(self, other, dividing=dividing)))

    def reflected(self, other):
        return Tensor(function(*promote(other, self, dividing=dividing)))

    setattr(Tensor, f"__{name}__", forward)
    if name not in _COMPARISON:
        setattr(Tensor, f"__r{name}__", reflected)


for _name, _function in {**_ARITHMETIC, **_COMPARISON}.items():
    _define_operator(_name, _function)
for _name, _function in _DIVISION.items():
    _define_operator(_name, _function, dividing=True)
