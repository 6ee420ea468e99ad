"""A GPU that is not there, as fake_gpu.py has it, but under Triton's own launcher in C: what that hands to CUDA's driver
reaches stub_libcuda.c, and from there, if anyone listens, Python. Needs a C compiler, as Triton's launcher itself does."""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tfkern import compat_triton
from tfkern.bench import fake_gpu

SOURCE = Path(__file__).with_name("stub_libcuda.c")
BYTES = dict(u8=1, b8=1, u16=2, b16=2, u32=4, b32=4, f32=4, u64=8, b64=8)
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+)[^,\[\n]*(?:\[(\d+)\])?")


class Encoding(NamedTuple):
    """The arguments of one cuTensorMapEncodeTiled, innermost dim first, and the map that it gave."""

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all dims but the innermost
    box: tuple[int, ...]
    steps: tuple[int, ...]
    kind: int
    swizzle: int
    map: bytes


class Launched(NamedTuple):
    """What one cuLaunchKernelEx got."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int | None
    attributes: tuple[tuple[int, bytes], ...]
    parameters: tuple[bytes, ...]


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_char * 4), ("value", ctypes.c_char * 64))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


_LONGS, _INTS = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
_ON_LAUNCH = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Config), ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p))
_ON_ENCODE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, _LONGS, _LONGS, _INTS, _INTS, ctypes.c_int
)


def compiler() -> str | None:
    """The C compiler that Triton would take, or None."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


class Stub:
    """For the rest of the process, an H100 whose driver does nothing. To be made before the first attention."""

    def __init__(self):
        self.launches: list[Launched] = []
        self.encodings: list[Encoding] = []
        self._sizes: dict[int, list[int]] = {}  # of each function's parameters
        self._folder = tempfile.TemporaryDirectory(prefix="tfkern-stub-")  # Triton links its launchers against it
        nvidia = compat_triton.nvidia_driver()
        command = (compiler(), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{nvidia.include_dirs[0]}")
        path = Path(self._folder.name, "libcuda.so.1")
        subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True)
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = self._folder.name
        driver = fake_gpu.Driver(90, None)
        driver.utils, driver.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        fake_gpu.install(driver)

    def listen(self) -> None:
        """From here on, `launches` and `encodings` grow."""
        compat_triton.after_loading(self._loaded)
        self._listeners = _ON_LAUNCH(self._launch), _ON_ENCODE(self._encode)
        self.library.listen(*self._listeners)

    def _loaded(self, module, function, name, files, hash) -> None:
        text = next(Path(path) for file, path in files.items() if file.endswith(".ptx")).read_text()
        parameters = text[text.index(".entry") : text.index("{", text.index(".entry"))]
        self._sizes[function] = [BYTES[kind] * int(count or 1) for kind, count in PARAMETER.findall(parameters)]

    def _launch(self, config, function, parameters) -> None:
        c = config.contents
        self.launches.append(Launched(
            function, tuple(c.grid), tuple(c.block), c.shared, c.stream,
            tuple((c.attributes[i].id, bytes(c.attributes[i].value)[:12]) for i in range(c.count)),
            tuple(ctypes.string_at(parameters[i], size) for i, size in enumerate(self._sizes[function])),
        ))  # fmt: skip

    def _encode(self, encoded, kind, rank, base, sizes, strides, box, steps, swizzle) -> None:
        self.encodings.append(Encoding(
            base, *(tuple(x[:n]) for x, n in ((sizes, rank), (strides, rank - 1), (box, rank), (steps, rank))),
            kind, swizzle, ctypes.string_at(encoded, 128),
        ))  # fmt: skip
