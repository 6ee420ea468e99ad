"""The planner: every kernel's parameters are described, nothing is given by its place, and what does not fit is an error."""

import pytest
import torch

from tfkern import call, layout, planner, tiles
from tfkern.backends import hopper
from tfkern.planner import KERNELS

KERNEL = pytest.mark.parametrize("name", KERNELS)


def problem(head_dim: int = 64):
    """A small call of which every size differs: 12 query heads and 3 key heads, 70 queries and 40 keys, a bias, slopes."""
    q, k = (torch.zeros(2, heads, n, head_dim, dtype=torch.bfloat16) for heads, n in ((12, 70), (3, 40)))
    return call.build(
        q, k, k, torch.zeros(12, 70, 40), scale=0.5, enable_gqa=True, window=(7, 9), causal_alignment="lower_right",
        alibi_slopes=torch.zeros(12),
    )  # fmt: skip


def tensors(name: str, p) -> dict:
    """What the kernel takes, each in its own shape."""
    wants = planner.parameters(planner._function(name))
    names = {planner._tensor(x) for x in (*wants.tensors, *wants.numbers) if x in wants.tensors or x.startswith("stride_")}
    return {x: torch.zeros(planner._shape(x, p), dtype=torch.bfloat16) for x in sorted(names)}


def config(name: str):
    """Of the kernel's own kind; None: the planner's choice."""
    if not name.startswith("hopper."):
        return None
    kernel = name.removeprefix("hopper.")
    if kernel in tiles.HOPPER_BACKWARD:
        return tiles.HOPPER_BACKWARD[kernel][64].usual
    return {"flash_fwd": tiles.HOPPER[64].single, "flash_fwd_short": tiles.HOPPER[64].short}.get(kernel) or (
        tiles.HOPPER_ONE_PASS[64][0]
    )


def planned(name: str, **changes):
    p, t = problem()
    given = {x: y for x, y in (tensors(name, p) | changes).items() if y is not ...}
    return planner.plan(name, p, t.bias, given, config(name))


@KERNEL
def test_every_parameter_gets_what_it_is_called_after(name):
    launch, (p, _) = planned(name), problem()
    wants = planner.parameters(launch.kernel)
    numbers = dict(zip(wants.numbers, launch.numbers, strict=True))
    assert list(launch.constants) == list(wants.constants)
    known = dict(
        batch=2, heads=12, group=4, n_q=70, n_k=40, scale=0.5, align=1, left=7, right=9,
        bias_batch=1, bias_heads=12, bias_rows=70, bias_columns=40,
    )  # fmt: skip
    assert {x: known[x] for x in numbers.keys() & known.keys()} == {x: numbers[x] for x in numbers.keys() & known.keys()}
    assert launch.constants.get("HEAD_DIM", 64) == 64
    assert launch.constants.get("MASK_VEC", 8) == 8
    for stride in filter(planner._is_stride, wants.numbers):
        x = tensors(name, p)[planner._tensor(stride)]
        vec = launch.constants.get("VEC", layout.MASK_VEC)
        assert numbers[stride] == tuple(layout.encode(s // vec) for s in x.stride()[:3])
    assert len(launch.names) == len(wants.tensors)


@KERNEL
def test_names_that_are_not_the_kernels(name):
    """One missing, one too many; the message names both the kernel and the tensor."""
    some = next(iter(tensors(name, problem()[0])))
    with pytest.raises(TypeError, match=f"{name}: there are no tensors for its parameters {some}"):
        planned(name, **{some: ...})
    with pytest.raises(TypeError, match=f"{name}: there are no parameters for the tensors W"):
        planned(name, W=torch.zeros(1))


@KERNEL
def test_swapped_tensors_are_an_error_at_planning(name):
    """Queries for keys, and whatever has another shape than its name stands for."""
    given = tensors(name, problem()[0])
    with pytest.raises(ValueError, match=rf"{name}: \w+ must have the shape .*, but has "):
        planned(name, Q=given["K"], K=given["Q"])
    with pytest.raises(ValueError, match=f"{name}: STATS must have the shape"):
        planned(name, STATS=given["STATS"].transpose(2, 3))


@KERNEL
def test_a_launch_takes_its_tensors_by_name(name):
    """In any order, each to its parameters; others than the kernel's are refused."""
    launch, given = planned(name), tensors(name, problem()[0])
    needed = {x: given[x] for x in launch.names}
    assert all(x is given[y] for x, y in zip(launch.ordered(dict(reversed(needed.items()))), launch.names, strict=True))
    for wrong in (needed | dict(W=None), {x: y for x, y in needed.items() if x != "Q"}, needed | dict(W=None)):
        with pytest.raises(TypeError, match=f"{launch.kernel.__name__} is launched with"):
            launch.ordered(wrong)
    with pytest.raises(TypeError, match="is launched with"):
        launch.ordered({("W" if x == "Q" else x): y for x, y in needed.items()})


def test_each_backend_plans_only_kernels_that_are_described():
    """Every table of tiles is of a kernel that the planner knows."""
    assert set(tiles.KERNELS) == {x for x in KERNELS if "." not in x}
    assert set(tiles.HOPPER_BACKWARD) <= {x.removeprefix("hopper.") for x in KERNELS}
    assert hopper.limits(problem()[0]) == []


def test_a_number_that_nothing_is_known_for(monkeypatch):
    monkeypatch.setitem(KERNELS, "flash_bwd_dbias", KERNELS["flash_bwd_dbias"]._replace(own=lambda p: {}))
    with pytest.raises(
        TypeError, match="flash_bwd_dbias: there are no values for its parameters SUM_COLUMNS, SUM_ROWS, bias_batch"
    ):
        planned("flash_bwd_dbias")
    monkeypatch.setitem(KERNELS, "flash_fwd", KERNELS["flash_fwd"]._replace(own=lambda p: dict(odd=1)))
    with pytest.raises(TypeError, match="flash_fwd: there are no parameters for the values odd"):
        planned("flash_fwd")
