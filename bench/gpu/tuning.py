"""Time tile sizes: for each kernel the best few of the cost model (candidates.py), and those of the tables.

The kernels take turns, each with its best candidate first, so that each has had a share when time is up. The time is that of a
backend's whole forward or backward, verified first, with the tiles of the other kernels as in the tables.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from tfkern import backends, call, configs, tiles
from tfkern.bench import faults, timing, verify
from tfkern.bench.providers import passed_over
from tfkern.bench.shapes import Shape
from tfkern.bench.static import candidates

SHAPES = [
    Shape("512", 64, 12, 512, 64), Shape("4096-causal-d128", 2, 16, 4096, 128, is_causal=True), Shape("197", 64, 12, 197, 64),
    Shape("1024-causal", 8, 12, 1024, 64, is_causal=True), Shape("128", 256, 12, 128, 64), Shape("2048", 8, 12, 2048, 64),
]  # fmt: skip
Config = configs.TileConfig | tiles.HopperConfig | tiles.HopperOnePass


@dataclass(frozen=True)
class Candidate:
    """Tiles for a kernel of a backend, on a shape. own: whether they are in the table."""

    backend: str
    kernel: str
    shape: Shape
    config: Config
    own: bool

    @property
    def tiles(self) -> str:
        numbers = ((key, x) for key, x in vars(self.config).items() if key not in ("source", "cycles") and x is not None)
        return ",".join(f"≤{x}" if key == "registers" and self.backend == "portable" else str(x) for key, x in numbers)

    @property
    def name(self) -> str:
        return f"{self.backend} {self.kernel} {self.shape.name} {self.tiles}"

    @property
    def fits(self) -> bool:
        """Whether the kernel takes the shape with these tiles."""
        shape, config = self.shape, self.config
        if self.kernel == "flash_bwd":
            return -(-shape.length // tiles.HOPPER_QUERIES) <= config.tiles
        if self.kernel == configs.ONE_PASS:
            return shape.length <= config.block_n
        return self.kernel != "flash_fwd_short" or shape.length <= config.stages * config.block_n


def cases(first_only: bool = False) -> Iterator[Candidate]:
    """Yield the first candidate of every kernel on every shape, then the second, and so on. first_only: yield one candidate
    of each kernel."""
    found = [list(of(backend, kernel, shape)) for shape in SHAPES for backend, kernel in candidates.KERNELS]
    if first_only:
        firsts = {one.kernel + one.backend: one for some in reversed(found) for one in some[:1]}
        yield from reversed(firsts.values())
        return
    for place in range(max(map(len, found))):
        yield from (some[place] for some in found if place < len(some))


def of(backend: str, kernel: str, shape: Shape) -> Iterator[Candidate]:
    """Yield the candidates of a kernel for a shape: those of the table, then those of the cost model, best first. A kernel
    that the table does not have for the head dim has no candidates."""
    own = _hopper_table(kernel, shape) if backend == "hopper" else _portable_table(kernel, shape)
    kind = tiles.HopperOnePass if kernel == "flash_bwd" else tiles.HopperConfig if backend == "hopper" else configs.TileConfig
    best = [kind(*numbers) for numbers in candidates.best(backend, kernel, shape.head_dim)]
    for config in dict.fromkeys([*own, *best] if own else []):
        one = Candidate(backend, kernel, shape, config, config in own)
        if one.fits:
            yield one


def _portable_table(kernel: str, shape: Shape) -> list[Config]:
    if kernel == configs.ONE_PASS:
        return configs.one_pass_tiles("sm_90", 2, shape.head_dim)
    if kernel == configs.DESCRIBED:
        return [config] if (config := configs.described("sm_90", 2, shape.head_dim)) else []
    return [configs.tile_config("sm_90", kernel, 2, shape.head_dim)]


def _hopper_table(kernel: str, shape: Shape) -> list[Config]:
    if kernel == "flash_bwd":
        return list(tiles.HOPPER_ONE_PASS.get(shape.head_dim, ()))
    if kernel.startswith("flash_bwd"):
        return [tiles.HOPPER_BACKWARD[kernel][shape.head_dim].usual]
    found = tiles.HOPPER[shape.head_dim]
    return [found.short] if kernel == "flash_fwd_short" and found.short else [*found.usual] if kernel == "flash_fwd" else []


@contextlib.contextmanager
def taken(one: Candidate) -> Iterator[None]:
    """Make the candidate's kernel take its tiles within the block. A backward in one launch is taken only if it is the
    candidate."""
    config, dim = one.config, one.shape.head_dim
    if one.backend == "portable":
        with configs.override(**{configs.ONE_PASS: None, one.kernel: config}):
            yield
        return
    one_pass = {dim: (config,)} if one.kernel == "flash_bwd" else {}
    if one.kernel.startswith("flash_fwd"):
        table, found = tiles.HOPPER, tiles.HOPPER[dim].alone(config, one.kernel == "flash_fwd_short")
    else:
        name = "flash_bwd_dq" if one.kernel == "flash_bwd" else one.kernel
        usual = tiles.HOPPER_BACKWARD[name][dim]
        table = tiles.HOPPER_BACKWARD[name]
        found = usual if one.kernel == "flash_bwd" else tiles.HopperBackwardTiles(config, config, config)
    with (
        mock.patch.dict(table, {dim: found}),
        mock.patch.dict(tiles.HOPPER_ONE_PASS, one_pass, clear=True),
        mock.patch.dict(call._problems, clear=True),  # cached problems keep their plans
    ):
        yield


def _call(one: Candidate, q, k, v, do, choose) -> timing.Call:
    """A function that runs the pass to which the candidate's kernel belongs, forward or backward, and returns its results by
    name. choose(problem, name) returns the backend."""
    problem, tensors = call.build(q, k, v, is_causal=one.shape.is_causal)
    backend = choose(problem, one.backend)

    @torch.no_grad()
    def forward():
        return dict(zip(("out", "stats"), backend.forward(problem, tensors), strict=True))

    if one.kernel.startswith("flash_fwd"):
        return forward
    made = forward()
    needed = (True,) * 3 + (False,) * 3  # the gradients of q, k and v

    @torch.no_grad()
    def backward():
        found = backend.backward(problem, tensors, *made.values(), do, None, needed)
        return dict(dq=found.q, dk=found.k, dv=found.v)

    return backward


def launch(one: Candidate, device: torch.device) -> None:
    """Run the pass that `rows` times, on uninitialised memory, and without asking whether the backend supports the device."""
    with taken(one):
        _call(one, *one.shape.memory(torch.bfloat16, device), lambda _, name: backends.BACKENDS[name])()


def rows(one: Candidate, device: torch.device) -> Iterator[dict]:
    """Yield one row: the median milliseconds of the pass, or the reason why it cannot run as `skipped`, or wrong results as
    `problem`."""
    row = dict(backend=one.backend, kernel=one.kernel, shape=one.shape.name, own=one.own, tiles=one.tiles)
    try:
        given, right = (make(one.shape, torch.bfloat16, device) for make in (verify.inputs, verify.oracle))
        with taken(one):
            timed = _call(one, *given, backends.choose)
            found = {name: x for name, x in timing.again(timed).items() if name != "stats"}
            if wrong := [str(e) for e in verify.worst(found, right) if not e.ok]:
                yield {**row, "problem": f"wrong results: {'; '.join(wrong)}"}
                return
            yield {**row, "ms": timing.milliseconds(timed, device, 0.03)[1]}
    except Exception as error:
        reason = faults.line(error) if faults.is_compilers(error) else passed_over(f"tfkern {one.backend}", error)
        yield {**row, "skipped": reason}
