"""Running kernels in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors, with bfloat16 and dot mended, and every address
checked against the tensors that the kernel was given: a read or write beside them raises instead of finding a neighbour."""

import dataclasses
import functools
import os


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter. Decided once, as Triton does when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def prepare() -> None:
    """Make bfloat16 and dot right. The interpreter keeps bfloat16 as uint16 bits; its dot multiplies those as integers, and its
    conversion from float32 truncates where GPUs round to nearest even. On a GPU an element of a product is the same in
    whichever tile it is, and whichever operand comes first, so that forward and backward see the same scores. BLAS sums
    float32 in other orders for other shapes; in float64, as here, that does not show."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    def widen(data):
        return (data.astype(np.uint32) << 16).view(np.float32)

    def narrow(data):
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    def dot(self, a, b, acc, *rest):
        a, b = ((widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data).astype(np.float64) for x in (a, b))
        return TensorHandle(np.matmul(a, b).astype(acc.data.dtype) + acc.data, acc.dtype.scalar)

    def cast(self, x, dtype):
        kinds = (x.dtype.scalar, dtype.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(x.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(x.data), tl.bfloat16)
        return original_cast(self, x, dtype)

    InterpreterBuilder.create_dot = dot
    original_cast, InterpreterBuilder.cast_impl = InterpreterBuilder.cast_impl, cast

    def load(self, pointers, mask, *rest, **named):
        _check(pointers, mask, "read")
        return original_load(self, pointers, mask, *rest, **named)

    def store(self, pointers, value, mask, *rest, **named):
        _check(pointers, mask, "write")
        return original_store(self, pointers, value, mask, *rest, **named)

    original_load, InterpreterBuilder.create_masked_load = InterpreterBuilder.create_masked_load, load
    original_store, InterpreterBuilder.create_masked_store = InterpreterBuilder.create_masked_store, store
    # Without `debug` the interpreter works out whether integers overflow, in seven steps an operation, and tells nobody.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    _patch_once_a_launch()


_patched: list[set] = []  # of each launch that runs: the sets of language modules that are patched


def _patch_once_a_launch() -> None:
    """The interpreter replaces the functions of triton.language anew at each call of a device function, which takes half of its
    time and changes nothing: what is patched stays so until the launch ends."""
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def languages(function) -> frozenset:
        return frozenset(value is tl for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch(function):
        if not _patched:  # a launch that is not ours
            return original(function)
        if languages(function) in _patched[-1]:
            return None
        _patched[-1].add(languages(function))
        scope = original(function)
        tl.core.tensor.__index__ = lambda self: self.handle.data.item()  # Triton 3.6's own fails with NumPy 2.4
        return scope

    original, interpreter._patch_lang = interpreter._patch_lang, patch


_spans: list[tuple[int, int]] = []  # first byte and one beyond the last of each tensor of the kernel that runs


def _check(pointers, mask, verb: str) -> None:
    """All addresses of one load or store are inside one tensor."""
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
    """The tensors among arguments, those in tuples and behind descriptors included."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from _tensors(arg)
        elif hasattr(arg, "block_shape"):
            yield arg.base
        elif hasattr(arg, "data_ptr"):
            yield arg


def _span(tensor) -> tuple[int, int]:
    """The first byte of a tensor, and one beyond its last."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + elements * tensor.element_size()


def _launched(arg):
    """An argument as a launch passes it: floats are float32, whatever their size."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if isinstance(arg, tuple):
        parts = map(_launched, arg)
        return type(arg)(*parts) if hasattr(arg, "_fields") else tuple(parts)
    if isinstance(arg, float):
        return tl.tensor(TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
    return arg


def run(kernel, grid: int, args, kwargs) -> None:
    """Run grid programs of a kernel. Overflow and NaN are results on a GPU, so they are no warnings here."""
    import numpy as np

    prepare()
    _spans[:] = [_span(t) for t in _tensors((*args, *kwargs.values()))]
    _patched.append(set())
    try:
        with np.errstate(all="ignore"):
            kernel[(grid,)](*map(_launched, args), **kwargs)
    finally:
        _patched.pop()
