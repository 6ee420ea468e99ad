"""Kernels in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors.

Here bfloat16 and dot are corrected, and every address is checked against the tensors that the kernel was given: a read or write
outside them raises IndexError.
"""

import dataclasses
import functools
import os

from tfkern import compat_triton


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter. Decided once, as Triton does when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def prepare() -> None:
    """Correct the interpreter's bfloat16 and dot, and check addresses.

    The interpreter keeps bfloat16 as uint16 bits. Its dot multiplies those as integers, and its conversion from float32
    truncates where GPUs round to nearest even. Its dot sums float32 by BLAS, in an order that depends on the shape. On a GPU an
    element of a product depends neither on the tile nor on which operand comes first, so forward and backward see the same
    scores. Here products are therefore summed in float64, in which the order does not show.
    """
    import numpy as np
    import triton.language as tl

    theirs = compat_triton.interpreter()
    builder, handle = theirs.InterpreterBuilder, theirs.TensorHandle

    def widen(data):
        return (data.astype(np.uint32) << 16).view(np.float32)

    def narrow(data):
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    def dot(self, a, b, acc, *rest):
        a, b = ((widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data).astype(np.float64) for x in (a, b))
        return handle(np.matmul(a, b).astype(acc.data.dtype) + acc.data, acc.dtype.scalar)

    def cast(self, x, dtype):
        kinds = (x.dtype.scalar, dtype.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(widen(x.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return handle(narrow(x.data), tl.bfloat16)
        return original_cast(self, x, dtype)

    builder.create_dot = dot
    original_cast, builder.cast_impl = builder.cast_impl, cast

    def load(self, pointers, mask, *rest, **named):
        _check(pointers, mask, "read")
        return original_load(self, pointers, mask, *rest, **named)

    def store(self, pointers, value, mask, *rest, **named):
        _check(pointers, mask, "write")
        return original_store(self, pointers, value, mask, *rest, **named)

    original_load, builder.create_masked_load = builder.create_masked_load, load
    original_store, builder.create_masked_store = builder.create_masked_store, store
    # The interpreter checks integers for overflow, in seven steps an operation, but reports it only with `debug`.
    theirs.interpreter_builder.options = dataclasses.replace(theirs.interpreter_builder.options, sanitize_overflow=False)
    compat_triton.replace_patching(_once_a_launch)


_patched: list[set] = []  # for each launch that runs, the sets of language modules that are patched


def _once_a_launch(original):
    """The interpreter's function that patches triton.language, made to do so once a launch.

    The interpreter patches the language anew at each call of a device function, which takes half of its time and changes
    nothing: a patch lasts until the launch ends.
    """
    import triton.language as tl

    @functools.cache
    def languages(function) -> frozenset:
        return frozenset(value is tl for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch(function):
        if not _patched:  # no launch of ours runs
            return original(function)
        if languages(function) in _patched[-1]:
            return None
        _patched[-1].add(languages(function))
        scope = original(function)
        tl.core.tensor.__index__ = lambda self: self.handle.data.item()  # Triton 3.6's own fails with NumPy 2.4
        return scope

    return patch


_spans: list[tuple[int, int]] = []  # of each tensor of the kernel that runs, the first byte and the one after the last


def _check(pointers, mask, verb: str) -> None:
    """IndexError unless all addresses of a load or store are within one tensor."""
    at = pointers.data[mask.data]
    if at.size == 0:
        return
    first, last = int(at.min()), int(at.max()) + pointers.get_element_ty().primitive_bitwidth // 8
    if not any(lo <= first and last <= hi for lo, hi in _spans):
        near = min(_spans, key=lambda span: min(abs(first - span[0]), abs(last - span[1])), default=(0, 0))
        raise IndexError(
            f"a kernel would {verb} bytes [{first - near[0]}, {last - near[0]}) of a tensor that has {near[1] - near[0]}"
        )


def _tensors(args):
    """The tensors among arguments, also in tuples and behind descriptors."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from _tensors(arg)
        elif hasattr(arg, "block_shape"):
            yield arg.base
        elif hasattr(arg, "data_ptr"):
            yield arg


def _span(tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + elements * tensor.element_size()


def _launched(arg):
    """An argument as a launch on a GPU passes it: every float is float32."""
    import numpy as np
    import triton.language as tl

    if isinstance(arg, tuple):
        parts = map(_launched, arg)
        return type(arg)(*parts) if hasattr(arg, "_fields") else tuple(parts)
    if isinstance(arg, float):
        return tl.tensor(compat_triton.interpreter().TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
    return arg


def run(kernel, grid: int, args, kwargs) -> None:
    """Run `grid` programs of a kernel. NumPy's warnings of overflow and NaN are off, since on a GPU these are results."""
    import numpy as np

    prepare()
    _spans[:] = [_span(t) for t in _tensors((*args, *kwargs.values()))]
    _patched.append(set())
    try:
        with np.errstate(all="ignore"):
            kernel[(grid,)](*map(_launched, args), **kwargs)
    finally:
        _patched.pop()
