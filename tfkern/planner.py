"""The planner: what a kernel is launched with, worked out once, from the names of its parameters.

A kernel's parameters are tensors, first those that it gets by TMA; then F, its features; then numbers, which are known at run
time; then constants, which it is compiled for. Each gets what it is called after:

- `Q`, `STATS`: the tensor of that name (SHAPES). `q_desc`: the same tensor as a descriptor, for a kernel in Gluon.
- `stride_q`: the strides of the tensor Q, or None where Q is None or comes by TMA.
- numbers and constants: what `_numbers` and `_constants` have under that name, and what only this kernel has.

A parameter that nothing is known for, a tensor that no parameter is for, and a tensor of another shape than its name stands for
are errors, which tell the kernel and the parameter. Nothing is given by its place.

To add a kernel:

1. Write it under kernels/ in a file of its name, with parameters in this order.
2. Describe it in KERNELS: how its work is shared out, and the numbers and constants that no other kernel has.
3. Add the tensors that no other kernel has to SHAPES.
4. Give it tile sizes (tiles.py).
5. In a backend plan it, `plan("flash_fwd", problem, mask, dict(Q=q, …))`, and launch it with tensors by the same names,
   `launch(*features, Q=q, …)`.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tfkern import configs, launch, layout, tma
from tfkern.layout import Blank
from tfkern.problem import Problem, Tensors
from tfkern.tiles import HOPPER, HopperConfig, HopperOnePass, TileConfig


class Kernel(NamedTuple):
    """What the planner can't tell from a kernel's parameters."""

    share: Callable[[Problem, dict], tuple[int, int]]  # of a problem and the constants: (tiles of a head, tiles in all)
    persistent: bool = False  # whether as many programs as the device runs at once share the tiles, instead of one for each
    owns_keys: bool = False  # whether a program owns a tile of keys, and queries stream past it
    own: Callable[[Problem], dict] = lambda p: {}  # numbers and constants that no other kernel has


def _by_queries(p: Problem, constants: dict) -> tuple[int, int]:
    return _tiles(p, p.heads, p.n_q, constants["BLOCK_M"] * constants.get("CONSUMERS", 1))


def _by_keys(p: Problem, constants: dict) -> tuple[int, int]:
    return _tiles(p, p.kv_heads, p.n_k, constants["BLOCK_N"] * constants.get("CONSUMERS", 1))


def _tiles(p: Problem, heads: int, rows: int, block: int) -> tuple[int, int]:
    """Of all rows of a head; of packed sequences, as many as they may need at most (kernels/sequence.py)."""
    tiles = rows // block + p.batch + 1 if p.packed else -(-rows // block)
    return tiles, (1 if p.packed else p.batch) * heads * tiles


def _by_key_heads(p: Problem, constants: dict) -> tuple[int, int]:
    """A program takes a key head with all queries of its group."""
    return -(-p.n_q // constants["BLOCK_M"]), p.batch * p.kv_heads


def _by_bias(p: Problem, constants: dict) -> tuple[int, int]:
    """A program owns a tile of the bias itself."""
    batch, heads, rows, columns = p.bias
    tiles = -(-rows // constants["BLOCK_M"]) * -(-columns // constants["BLOCK_N"])
    return tiles, batch * heads * tiles


def _bias_sizes(p: Problem) -> dict:
    batch, heads, rows, columns = p.bias
    summed = dict(SUM_ROWS=rows == 1, SUM_COLUMNS=columns == 1)
    return dict(bias_batch=batch, bias_heads=heads, bias_rows=rows, bias_columns=columns, **summed)


# By the module under tfkern.kernels; its function has the module's name.
KERNELS = {
    "flash_fwd": Kernel(_by_queries),
    "flash_bwd_dq": Kernel(_by_queries),
    "flash_bwd_dkdv": Kernel(_by_keys, owns_keys=True),
    "flash_bwd_dbias": Kernel(_by_bias, own=_bias_sizes),
    "hopper.flash_fwd": Kernel(_by_queries, persistent=True),
    "hopper.flash_fwd_short": Kernel(_by_key_heads, persistent=True),
    "hopper.flash_bwd": Kernel(_by_key_heads, persistent=True),
    "hopper.flash_bwd_dq": Kernel(_by_queries),
    "hopper.flash_bwd_dkdv": Kernel(_by_keys, owns_keys=True),
}

# The dims of each tensor behind the batch, by the names that Problem has for them.
_OF_QUERIES, _OF_KEYS = ("heads", "n_q"), ("kv_heads", "n_k")
SHAPES = {
    **dict.fromkeys(("Q", "DQ"), (*_OF_QUERIES, "head_dim")),
    **dict.fromkeys(("O", "DO"), (*_OF_QUERIES, "v_head_dim")),
    **dict.fromkeys(("K", "DK"), (*_OF_KEYS, "head_dim")),
    **dict.fromkeys(("V", "DV"), (*_OF_KEYS, "v_head_dim")),
    **dict.fromkeys(("DLSE", "DELTA", "DSLOPES"), _OF_QUERIES),
    "STATS": ("heads", "stats_rows", "n_q"),
}
BIASES = ("DBIAS",)  # tensors of the bias's shape


def once(p: Problem, make: Callable, t: Tensors, *more):
    """What make(p, t, *more) gives, worked out once for all calls whose tensors lie in memory as these do. The problem keeps
    it."""
    tensors = (*t[:3], *more) if p.plain else (*t, *more)
    lie = [(x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in tensors]
    key = (make, configs.overrides(), precision(p), *lie)
    planned = p.plans.get(key)
    if planned is None:
        planned = p.plans[key] = make(p, t, *more)
    return planned


def plan(
    name: str, p: Problem, mask: Tensor | None, tensors: dict[str, Tensor | Blank | None],
    config: TileConfig | HopperConfig | HopperOnePass | None = None, by_tma: tuple[str, ...] = (),
) -> launch.Launch:  # fmt: skip
    """The launch of a kernel of KERNELS for a problem whose tensors lie in memory as these do.

    Args:
        mask: the boolean or the additive mask, if there is one.
        tensors: all that the kernel has parameters for, by name; None for what it is to do without.
        config: the tile sizes; None: those that configs.tile_config has for a kernel in Triton.
        by_tma: the tensors that a kernel in Triton gets as descriptors.

    Raises: TypeError for names and ValueError for shapes that are not the kernel's.
    """
    kernel, function = KERNELS[name], _function(name)
    wants = parameters(function)
    described = tuple(x for x in wants.tensors if x.endswith("_desc") or x in by_tma)
    if described != wants.tensors[: len(described)]:
        raise TypeError(f"{name}: the tensors by TMA, {described}, must be the first of {wants.tensors}")
    _check(name, p, wants, tensors)
    vec, strides = _strides(wants, tensors, by_tma)
    if config is None:
        heavy = p.heavy or vec == 0  # an address for each element takes as many registers as a score does
        config = configs.tile_config(launch.architecture(p.device), name, p.dtype.itemsize, head_dim_class(p), heavy)
    constants = _constants(p, mask, vec, config, wants.gluon, kernel.owns_keys)
    tiles, items = kernel.share(p, constants)
    own = kernel.own(p)
    values = _numbers(p, tiles, items) | constants | strides | own
    _complain(name, "no values for its parameters", {*wants.numbers, *wants.constants} - values.keys())
    _complain(name, "no parameters for the values", own.keys() - {*wants.numbers, *wants.constants})
    programs = min(items, launch.multiprocessors(p.device) * config.programs) if kernel.persistent else items
    return launch.Launch(
        function, programs, p.device, tuple(map(_tensor, wants.tensors)), tuple(values[x] for x in wants.numbers),
        {x: values[x] for x in wants.constants}, config.options(),
        tuple(_block(_tensor(x), constants, wants.gluon) for x in described),
    )  # fmt: skip


class Parameters(NamedTuple):
    """The names of a kernel's parameters, in its order."""

    tensors: tuple[str, ...]
    numbers: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def gluon(self) -> bool:
        """Whether it is written in Gluon, with rules of its own for descriptors and strides (tma.py)."""
        return any(x.endswith("_desc") for x in self.tensors)


def parameters(function) -> Parameters:
    """The parameters of a jit function."""
    names, constants = function.arg_names, [x for x in function.arg_names if x in function.fn.__annotations__]
    place = names.index("F")
    tensors, numbers = names[:place], names[place + 1 : len(names) - len(constants)]
    if [*tensors, "F", *numbers, *constants] != names:
        raise TypeError(f"{function.__name__}: constants must be the last of the parameters {names}")
    return Parameters(tuple(tensors), tuple(numbers), tuple(constants))


def _function(name: str):
    return getattr(importlib.import_module(f"tfkern.kernels.{name}"), name.rpartition(".")[2])


def _tensor(parameter: str) -> str:
    """The tensor that a parameter belongs to: Q, q_desc and stride_q to Q."""
    return parameter.removeprefix("stride_").removesuffix("_desc").upper()


def _check(name: str, p: Problem, wants: Parameters, tensors: dict) -> None:
    """That these are the kernel's tensors, each of the shape that its name stands for."""
    wanted = {_tensor(x) for x in (*wants.tensors, *filter(_is_stride, wants.numbers))}
    _complain(name, "no tensors for its parameters", wanted - tensors.keys())
    _complain(name, "no parameters for the tensors", tensors.keys() - wanted)
    _complain(name, "no shapes in SHAPES of", wanted - {*SHAPES, *BIASES})
    for key, x in tensors.items():
        shape = _shape(key, p)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: {key} must have the shape {shape}, but has {tuple(x.shape)}")


def _complain(name: str, what: str, names: set[str]) -> None:
    if names:
        raise TypeError(f"{name}: there are {what} {', '.join(sorted(names))}")


def _shape(tensor: str, p: Problem) -> tuple[int, ...]:
    if tensor in BIASES:
        return p.bias
    return (1 if p.packed else p.batch, *(getattr(p, size) for size in SHAPES[tensor]))


def _is_stride(parameter: str) -> bool:
    return parameter.startswith("stride_")


def _strides(wants: Parameters, tensors: dict, by_tma: tuple[str, ...]) -> tuple[int, dict[str, tuple | None]]:
    """(VEC, strides by parameter). VEC is of all of them together (kernels/tile.py)."""
    strides = {x: tensors[_tensor(x)] for x in wants.numbers if _is_stride(x) and _tensor(x) not in by_tma}
    there = {parameter: x for parameter, x in strides.items() if x is not None}
    if wants.gluon:
        vec, found = tma.ALIGNED, list(map(tma.strides, there.values()))
    else:
        vec, found = layout.kernel_strides(*there.values())
    return vec, dict.fromkeys(filter(_is_stride, wants.numbers)) | dict(zip(there, found, strict=True))


def _numbers(p: Problem, tiles: int, items: int) -> dict:
    """What kernels take at run time."""
    scale = 1.0 if p.scale is None else p.scale  # then the kernel reads it from memory
    return dict(
        batch=p.batch, heads=p.heads, group=p.group, n_q=p.n_q, n_k=p.n_k, tiles=tiles, items=items, sets=items, scale=scale,
        align=int(p.lower_right), left=p.left, right=p.right,
    )  # fmt: skip


def _constants(p: Problem, mask: Tensor | None, vec: int, config, gluon: bool, owns_keys: bool) -> dict:
    """What kernels are compiled for."""
    value, derivative = p.score_mod or (None, None)
    least = min(HOPPER) if gluon else 1
    block_d, block_dv = (max(least, configs.head_dim_class(x)) for x in (p.head_dim, p.v_head_dim))
    return dict(
        HEAD_DIM=p.head_dim, HEAD_DIM_V=p.v_head_dim, BLOCK_DV=block_dv, VEC=vec, PRECISION=precision(p), MOD=value,
        MOD_GRAD=derivative, LINEAR=p.linear, MASK_VEC=0 if mask is None else layout.mask_strides(mask)[0],
        STATS_ROWS=p.stats_rows, **config.constants(block_d, owns_keys),
    )  # fmt: skip


def _block(tensor: str, constants: dict, gluon: bool) -> tuple:
    """What tma.descriptor takes beside the tensor: rows and columns of a block, and for whom."""
    rows = "BLOCK_M" if "n_q" in SHAPES[tensor] else "BLOCK_N"
    columns = "BLOCK_D" if "head_dim" in SHAPES[tensor] else "BLOCK_DV"
    return constants[rows], constants[columns], gluon


def head_dim_class(p: Problem) -> int:
    """That whose tiles serve both head dims, in kernels in Triton."""
    return configs.head_dim_class(max(p.head_dim, p.v_head_dim))


def precision(p: Problem) -> str:
    """IEEE products for float32, unless PyTorch's own switch allows TF32; 16-bit products are exact in either."""
    if p.dtype != torch.float32:
        return "ieee"
    arch = launch.architecture(p.device)
    able = arch.startswith("sm_") or arch == "gfx942"
    return "tf32" if able and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
