"""Kinds of errors: the process has lost the GPU, memory is too small, or the case itself is at fault."""

import re
from collections.abc import Iterator

CUDA = re.compile(
    r"CUDA (driver )?error|cudaError[A-Z]|CUDA_ERROR_|AcceleratorError|Triton Error \[CUDA\]|device-side assert"
    r"|illegal (memory access|instruction)|misaligned address|unspecified launch failure"
    r"|CUBLAS_STATUS_(EXECUTION|INTERNAL)|CUDNN_STATUS_EXECUTION"
)
MEMORY = re.compile(r"out of memory|^(MemoryError|OutOfMemoryError)")


def is_sticky(error: BaseException | str) -> bool:
    """Whether an error, or its text, is one of CUDA, after which every later call of the process may fail. Too little memory is
    not."""
    return any(CUDA.search(text) and not MEMORY.search(text) for text in _texts(error))


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error says that memory is too small."""
    return not is_sticky(error) and any(map(MEMORY.search, _texts(error)))


def is_compilers(error: BaseException) -> bool:
    """Whether Triton's compiler refused a kernel; with other tiles it may accept it."""
    from triton.errors import TritonError

    return not is_sticky(error) and (isinstance(error, TritonError) or "PassManager" in str(error))


def line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _texts(error: BaseException | str) -> Iterator[str]:
    """The texts of an error and of its causes and contexts."""
    if isinstance(error, str):
        yield error
        return
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__
