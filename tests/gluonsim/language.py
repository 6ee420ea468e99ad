"""The simulated Gluon builtins, under the names Gluon gives them.

The methods of ``Language``, ``Tma`` and ``MBarriers`` stand for the functions of ``gluon.language`` (with those of
``language.nvidia.hopper``), of its ``tma`` and of its ``mbarrier`` module.  Arguments that only matter to code
generation are accepted and ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from tfkern import dropout

from .cta import Cta
from .errors import HazardKind, UnsupportedError
from .global_memory import TensorDescriptor
from .shared_memory import SharedView
from .tensor import Pointer, Tensor, as_tensor, promote, torch_dtype

_WORD = 0xFFFFFFFF
_NAMED_BARRIER = re.compile(r"\bbar(?:rier)?(?:\.cta)?\.(sync|arrive)\s+(\d+)\s*,\s*(\d+)")


class _Builtins:
    """Builtins act on the CTA that is being simulated."""

    def __init__(self, current_cta: Callable[[], Cta]):
        self._current_cta = current_cta

    @property
    def _cta(self) -> Cta:
        return self._current_cta()


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, x: Tensor(function(x.data))


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Any, Any, Any], Tensor]:
    return lambda self, x, y, **hints: Tensor(function(*promote(x, y)))


def _reduction(function: Callable[..., torch.Tensor]) -> Callable[..., Tensor]:

    def reduce(self, input, axis=None, keep_dims=False):
        axes = tuple(range(len(input.shape))) if axis is None else axis
        return Tensor(function(input.data, dim=axes, keepdim=keep_dims))

    return reduce


def _identity(self, x, *hints, **more_hints):
    return x


def _ignored(self, *arguments, **hints):
    """A hint or a check for the compiler."""


class Language(_Builtins):
    """``gluon.language`` and ``gluon.language.nvidia.hopper``."""

    # ---- program structure

    def program_id(self, axis):
        return as_tensor(self._cta.program_id[axis])

    def num_programs(self, axis):
        return as_tensor(self._cta.num_programs[axis])

    def static_range(self, *bounds, **hints):
        return range(*map(int, bounds))

    def static_assert(self, condition, message=""):
        assert condition, message

    static_print = device_print = assume = _ignored
    multiple_of = max_contiguous = max_constancy = _identity

    def warp_specialize(self, functions_and_args, worker_num_warps, worker_num_regs=None):
        default, *workers = [partial(function, *args) for function, args in functions_and_args]
        return self._cta.specialize(default, list(zip(workers, worker_num_warps, strict=True)))

    def inline_asm_elementwise(self, asm, constraints, args, dtype, is_pure, pack):
        barrier = _NAMED_BARRIER.search(asm)
        if barrier is None:
            raise UnsupportedError(f"inline assembly: {asm}")
        kind, index, threads = barrier.groups()
        self._cta.begin_step()
        self._cta.arrive_named(int(index), int(threads), wait=kind == "sync")
        return args[0]

    # ---- register tensors

    def arange(self, start, end, layout=None):
        return Tensor(torch.arange(start, end, dtype=torch.int32))

    def full(self, shape, value, dtype, layout=None):
        return Tensor(torch.full(tuple(shape), value, dtype=torch_dtype(dtype)))

    def zeros(self, shape, dtype, layout=None):
        return self.full(shape, 0, dtype)

    def to_tensor(self, x):
        return as_tensor(x)

    convert_layout = set_auto_layout = _identity

    exp, exp2, log, log2 = map(_unary, (torch.exp, torch.exp2, torch.log, torch.log2))
    sqrt, rsqrt, abs, floor, ceil = map(_unary, (torch.sqrt, torch.rsqrt, torch.abs, torch.floor, torch.ceil))
    maximum, minimum = _binary(torch.maximum), _binary(torch.minimum)
    max, min, sum = _reduction(torch.amax), _reduction(torch.amin), _reduction(torch.sum)

    def where(self, condition, x, y):
        return Tensor(torch.where(as_tensor(condition).data, *promote(x, y)))

    def cdiv(self, x, div):
        return (x + (div - 1)) // div

    def fma(self, x, y, z):
        return x * y + z

    def broadcast(self, x, y):
        return tuple(map(Tensor, torch.broadcast_tensors(x.data, y.data)))

    def reshape(self, x, shape):
        return Tensor(x.data.reshape(tuple(map(int, shape))))

    def permute(self, x, dims):
        return Tensor(x.data.permute(tuple(dims)))

    def join(self, x, y):
        return Tensor(torch.stack([x.data, y.data], -1))

    def philox(self, seed, c0, c1, c2, c3, n_rounds):
        """Words in int32, as the bits of Triton's uint32."""
        counters = (c.data.long() & _WORD for c in (c0, c1, c2, c3))
        key = seed.data.long()
        words = dropout.philox(*counters, key & _WORD, (key >> 32) & _WORD, n_rounds)
        return tuple(Tensor(torch.where(w >= 1 << 31, w - (1 << 32), w).int()) for w in words)

    # ---- global memory

    def load(self, pointer, mask=None, other=None, **hints):
        active = self._active(pointer, mask)
        values = pointer.base[torch.where(active, pointer.offsets, 0)]
        if other is None:
            other = float("nan") if values.is_floating_point() else 0
        return Tensor(torch.where(active, values, as_tensor(other).data.to(values.dtype)))

    def store(self, pointer, value, mask=None, **hints):
        offsets, values = self._scattered(pointer, value, mask)
        self._cta.claim_global(pointer.base, offsets)
        pointer.base[offsets] = values

    def atomic_add(self, pointer, value, mask=None, **hints):
        before = self.load(pointer, mask, other=0)
        offsets, values = self._scattered(pointer, value, mask)
        self._cta.claim_global(pointer.base, offsets, adding=True)
        pointer.base.index_put_((offsets,), values, accumulate=True)
        return before

    def _active(self, pointer: Pointer, mask: Tensor | bool | None) -> torch.Tensor:
        """Which elements of a block of pointers to access."""
        wanted = torch.ones_like(pointer.offsets, dtype=torch.bool) if mask is None else as_tensor(mask).data
        active = wanted & pointer.in_bounds
        if not torch.equal(active, wanted.expand_as(active)):
            self._cta.report(HazardKind.BOUNDS, "a pointer leads outside its tensor")
        return active

    def _scattered(self, pointer: Pointer, value: Any, mask: Tensor | bool | None) -> tuple[torch.Tensor, torch.Tensor]:
        active = self._active(pointer, mask)
        values = as_tensor(value).data.to(pointer.base.dtype).expand_as(active)
        return pointer.offsets.expand_as(active)[active], values[active]

    # ---- shared memory and wgmma

    def allocate_shared_memory(self, element_ty, shape, layout, value=None):
        view = self._cta.allocate(element_ty, shape, layout)
        if value is not None:
            view.store(value)
        return view

    def reinterpret(self, memory, dtype, shape, layout):
        return memory.reinterpret(dtype, shape, layout)

    _reinterpret = reinterpret  # its name until Triton 3.9

    def fence_async_shared(self, cluster=False):
        self._cta.begin_step().fence()

    def thread_barrier(self):
        """Within a partition, threads are always in step."""

    barrier = thread_barrier  # its name from Triton 3.7 on

    def warpgroup_mma_init(self, value):
        return value

    def warpgroup_mma(self, a, b, acc, *, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
        if a.shape[1] != b.shape[0] or (a.shape[0], b.shape[1]) != acc.shape:
            raise ValueError(f"wgmma of {a.shape} with {b.shape} into {acc.shape}")
        if gl.float32 in (a.dtype, b.dtype):
            raise UnsupportedError("wgmma in TF32")
        accumulator = self._cta.mma_async(a, b, acc if use_acc else None)
        return accumulator if is_async else self.warpgroup_mma_wait(0, (accumulator,))

    def warpgroup_mma_wait(self, num_outstanding=0, deps=None):
        self._cta.retire_mmas(num_outstanding)
        values = tuple(self._cta.retired_value(dep) for dep in deps)
        return values[0] if len(values) == 1 else values


class Tma(_Builtins):
    """``hopper.tma``, under its old and its new names."""

    def make_tensor_descriptor(self, base, shape, strides, block_shape, layout, padding_option="zero"):
        tensor = base.base[int(base.offsets) :].as_strided([int(size) for size in shape], [int(step) for step in strides])
        return TensorDescriptor(tensor, block_shape, layout, padding_option)

    def async_load(self, tensor_desc, coord, barrier, result, pred=True):
        if result.shape != tuple(tensor_desc.block_shape):
            raise ValueError(f"TMA load of {tensor_desc.block_shape} into {result.shape}")
        if pred:
            self._cta.load_async(tensor_desc, _corner(coord), self._cta.mbarrier(barrier), result)

    def async_store(self, tensor_desc, coord, src):
        self._store(tensor_desc, coord, src, adding=False)

    def async_atomic_add(self, tensor_desc, coord, src):
        self._store(tensor_desc, coord, src, adding=True)

    def store_wait(self, pendings):
        self._cta.retire_stores(pendings)

    async_copy_global_to_shared = async_load
    async_copy_shared_to_global = async_store

    def _store(self, tensor_desc: TensorDescriptor, coord: Sequence[Tensor | int], src: SharedView, *, adding: bool) -> None:
        if src.shape != tuple(tensor_desc.block_shape):
            raise ValueError(f"TMA store of {src.shape} to {tensor_desc.block_shape}")
        self._cta.store_async(src, tensor_desc, _corner(coord), adding=adding)


class MBarriers(_Builtins):
    """``hopper.mbarrier``."""

    def init(self, mbarrier, count):
        self._cta.init_mbarrier(mbarrier, count)

    def invalidate(self, mbarrier):
        self._cta.invalidate_mbarrier(mbarrier)

    def expect(self, mbarrier, bytes, pred=True):
        if pred:
            self._cta.mbarrier(mbarrier).expect(self._cta.begin_step(), int(bytes))

    def arrive(self, mbarrier, *, count=1, pred=True):
        if pred:
            self._cta.mbarrier(mbarrier).arrive(self._cta.begin_step(), count)

    def wait(self, mbarrier, phase, pred=True, deps=()):
        if pred:
            self._cta.wait_mbarrier(self._cta.mbarrier(mbarrier), int(phase))


def _corner(coord: Sequence[Tensor | int]) -> list[int]:
    return [int(index) for index in coord]
