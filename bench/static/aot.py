"""Compile kernels for a GPU that need not be there, and read their resources. Imports Triton, not torch."""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from tfkern import compat_triton

TARGETS = {f"sm_{n}": compat_triton.target("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = compat_triton.target("hip", "gfx942", 64)


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled kernel: registers a thread, spilled bytes a thread, bytes of shared memory a program, and the
    number of machine instructions."""

    registers: int
    spilled: int
    shared: int
    instructions: int


@dataclass(frozen=True)
class Constant:
    """An argument that is fixed at compile time."""

    value: object


def source(kernel, arguments: dict, gluon: bool = False):
    """A kernel and the types of its arguments, ready for triton.compile. `arguments` maps each parameter to a type ("*bf16",
    "i32"), a Constant, or a tuple of these, which may be nested. Pointers are assumed to be 16-byte aligned. gluon: the kernel
    is a Gluon kernel."""
    constants, attributes = {}, {}

    def signature(kind, *path):
        if isinstance(kind, Constant):
            constants[path] = kind.value
            return "constexpr"
        if isinstance(kind, tuple):
            parts = [signature(part, *path, i) for i, part in enumerate(kind)]
            return type(kind)(*parts) if hasattr(kind, "_fields") else tuple(parts)
        if kind.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    kinds = {name: signature(arguments[name], i) for i, name in enumerate(kernel.arg_names)}
    return compat_triton.source_kind(gluon)(kernel, kinds, constants, attributes)


def compile_kernel(kernel, arch: str, arguments: dict, config):
    """Compile a @triton.jit kernel for `arch`, a key of TARGETS. arguments: as for `source`. The options are those that
    `config` gives a launch, so the result is the code that runs."""
    return triton.compile(source(kernel, arguments), target=TARGETS[arch], options=config.options())


def cuobjdump(compiled) -> str:
    """The output of the Triton wheel's cuobjdump for a kernel compiled for NVIDIA: its resources and its machine code."""
    return _dumped(compiled.asm["cubin"])


@functools.lru_cache(maxsize=1)  # resources are asked for first, then the code of the same binary
def _dumped(cubin: bytes) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled, arch: str) -> Resources:
    """The resources of a compiled kernel, read from its cubin or its AMDGCN text."""
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        vgprs, spills = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
        code = re.findall(r"^\t[sv]_|^\t(?:ds|global|buffer)_", text, re.M)
        return Resources(vgprs, 4 * spills, compiled.metadata.shared, len(code))
    text = cuobjdump(compiled)
    # Triton kernels do not use the stack themselves: all bytes on it are spilled registers.
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups())
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", text, re.M))
    return Resources(registers, stack + local, compiled.metadata.shared, instructions)


def reduces_across_warps(compiled) -> bool:
    """Whether a loop has a sum or a maximum over numbers of several warps, which takes shared memory and barriers."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    inside = r'^ {6,}%\S+ = "tt\.reduce".*?axis = (\d).*?\}\) : \(tensor<[^,>]*, (#\w+)>'  # a loop's body is indented further
    return any(_spread(layouts[name], int(axis)) for axis, name in re.findall(inside, text, re.M | re.S))


def _spread(layout: str, axis: int) -> bool:
    """Whether the axis of a tensor with that layout is divided among warps."""
    if found := re.search(r"warpsPerCTA = \[([\d, ]+)\]", layout):
        return int(found[1].split(", ")[axis]) > 1
    warps = re.search(r"warp = \[(.*?)\], block", layout)[1]  # a linear layout: what each bit of the warp's number adds
    return any(int(basis.split(", ")[axis]) for basis in re.findall(r"\[([\d, ]+)\]", warps))
