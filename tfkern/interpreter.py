"""Running kernels in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors, with its bfloat16 mended."""

import functools
import os


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter. Must not change once Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def prepare() -> None:
    """Make bfloat16 right. The interpreter keeps it as uint16 bits; its dot multiplies those as integers, and its conversion
    from float32 truncates where GPUs round to nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widen(data):
        return (data.astype(np.uint32) << 16).view(np.float32)

    def narrow(data):
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    def dot(self, a, b, *rest):
        a, b = (TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return original_dot(self, a, b, *rest)

    def cast(self, x, dtype):
        kinds = (x.dtype.scalar, dtype.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(x.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(x.data), tl.bfloat16)
        return original_cast(self, x, dtype)

    original_dot, InterpreterBuilder.create_dot = InterpreterBuilder.create_dot, dot
    original_cast, InterpreterBuilder.cast_impl = InterpreterBuilder.cast_impl, cast


def run(kernel, grid: int, args, kwargs) -> None:
    """Run grid programs of a kernel. Overflow and NaN are results on a GPU, so they are no warnings here."""
    import numpy as np

    prepare()
    with np.errstate(all="ignore"):
        kernel[(grid,)](*args, **kwargs)
