"""The simulator finds what is wrong with small kernels, and only that."""

import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

sys.path.append(str(Path(__file__).resolve().parent))
import gluonsim_litmus as kernels
from gluonsim import SCHEDULES, DeadlockError, HazardError, HazardKind, UnsupportedError, simulate
from gluonsim import language as simulation_language
from gluonsim.shared_memory import SharedAllocation, SharedView


def descriptor(tensor, block_shape, **options):
    dtype = {torch.float32: gl.float32, torch.bfloat16: gl.bfloat16}[tensor.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block_shape, dtype)
    return TensorDescriptor.from_tensor(tensor, block_shape, layout, **options)


def hazards_of(launch, schedule="eager"):
    with simulate(schedule, record_hazards=True) as sim, suppress(DeadlockError):
        launch()
    return {hazard.kind for hazard in sim.hazards}


def copy(source, target, corner=0, *, padding="zero", **broken):
    block = [16, 32]
    options = dict(WAIT=True, FENCE=True, STORE_WAIT=True, INIT=True, EXPECTED=16 * 32 * source.element_size())
    kernels.copy[(1,)](descriptor(source, block, padding=padding), descriptor(target, block), corner, **{**options, **broken})


def two_types(source, target, **broken):
    options = dict(FENCE=True, STORE_WAIT=True, SECOND=False) | broken
    kernels.two_types[(1,)](descriptor(source, [16, 32]), descriptor(target, [16, 32]), **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_memory_read_as_another_type(schedule):
    source, target = torch.randn(16, 32).bfloat16(), torch.zeros(16, 32).bfloat16()
    with simulate(schedule):
        two_types(source, target)
    assert torch.equal(target, source + 1)


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (dict(FENCE=False), HazardKind.PROXY),
        (dict(STORE_WAIT=False), HazardKind.RACE),
        (dict(SECOND=True), HazardKind.UNDEFINED),
    ],
    ids=str,
)
def test_hazards_are_found_across_types(broken, kind):
    source, target = torch.randn(16, 32).bfloat16(), torch.zeros(16, 32).bfloat16()
    assert kind in hazards_of(lambda: two_types(source, target, **broken), "lazy")


def test_memory_is_read_as_another_type_only_where_it_is_in_one_piece():
    allocation = SharedView.whole(SharedAllocation(None, gl.float32, [2, 16, 32], None, "slot"))
    allocation.index(0).reinterpret(gl.bfloat16, [1, 16, 64], None)
    for view, shape in (
        (allocation.index(0), [17, 64]),
        (allocation.index(0).permute((1, 0)), [16, 32]),
        (allocation.index(0).reinterpret(gl.bfloat16, [16, 64], None), [16, 64]),
    ):
        with pytest.raises(UnsupportedError, match="seen as"):
            view.reinterpret(gl.bfloat16, shape, None)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copy_is_right_under_every_schedule(schedule):
    source, target = torch.randn(16, 32), torch.zeros(16, 32)
    with simulate(schedule):
        copy(source, target)
    torch.testing.assert_close(target, source + 1)


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (dict(WAIT=False), HazardKind.RACE),
        (dict(FENCE=False), HazardKind.PROXY),
        (dict(STORE_WAIT=False), HazardKind.EXIT),
        (dict(INIT=False), HazardKind.BARRIER),
    ],
)
def test_copy_without_a_synchronisation_is_flagged(broken, kind):
    assert kind in hazards_of(lambda: copy(torch.randn(16, 32), torch.zeros(16, 32), **broken))


def test_a_load_in_flight_reads_as_nan():
    target = torch.zeros(16, 32)
    kinds = hazards_of(lambda: copy(torch.randn(16, 32), target, WAIT=False), "lazy")
    assert HazardKind.UNDEFINED in kinds
    assert target.isnan().all()


@pytest.mark.parametrize("factor", [0, 2])
def test_waiting_for_other_than_the_loaded_bytes_deadlocks_or_is_flagged(factor):
    broken = dict(EXPECTED=16 * 32 * 4 * factor)
    if factor:
        with pytest.raises(DeadlockError, match=r"mbarrier full\[0\]"), simulate():
            copy(torch.randn(16, 32), torch.zeros(16, 32), **broken)
    else:
        kinds = hazards_of(lambda: copy(torch.randn(16, 32), torch.zeros(16, 32), **broken))
        assert {HazardKind.RACE, HazardKind.EXIT} <= kinds


@pytest.mark.parametrize(("padding", "outside"), [("zero", 1.0), ("nan", float("nan"))])
def test_tma_pads_loads_and_clips_stores(padding, outside):
    source, target = torch.randn(20, 32), torch.zeros(40, 32)
    with simulate():
        copy(source, target, corner=12, padding=padding)
    torch.testing.assert_close(target[12:20], source[12:] + 1)
    torch.testing.assert_close(target[20:28], torch.full((8, 32), outside), equal_nan=True)
    assert not target[:12].any()
    assert not target[28:].any()


def test_a_hazard_names_the_line():
    with pytest.raises(HazardError, match=r"gluonsim_litmus.py:\d+ in copy"), simulate():
        copy(torch.randn(16, 32), torch.zeros(16, 32), FENCE=False)


def run_product(**broken):
    a, b = torch.randn(64, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    c = torch.zeros(64, 16)
    options = dict(WAIT=True, OUTSTANDING=0, IS_ASYNC=True)
    kernels.product[(1,)](descriptor(a, [64, 32]), descriptor(b, [32, 16]), c, **{**options, **broken})
    return c, 2 * (a.double() @ b.double())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("is_async", [False, True])
def test_wgmma_accumulates(schedule, is_async):
    with simulate(schedule):
        actual, expected = run_product(WAIT=is_async, IS_ASYNC=is_async)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", [dict(WAIT=False), dict(OUTSTANDING=1)])
def test_an_accumulator_in_flight_is_flagged_and_nan(broken):
    with simulate("eager", record_hazards=True) as sim:
        actual, _ = run_product(**broken)
    assert {hazard.kind for hazard in sim.hazards} == {HazardKind.ACCUMULATOR, HazardKind.EXIT}
    assert actual.isnan().all()


def hand_over(INDEX=8, THREADS=256, ARRIVALS=1):
    target = torch.zeros(128, dtype=torch.int32)
    kernels.hand_over[(1,)](target, INDEX, THREADS, ARRIVALS)
    return target


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_named_barriers_order_partitions(schedule):
    with simulate(schedule):
        assert (hand_over() == 7).all()


def test_a_named_barrier_without_arrivals_deadlocks():
    with (
        pytest.raises(DeadlockError, match=r"worker 0 waits .* for named barrier 8 \(128 of 256 threads arrived\)"),
        simulate(),
    ):
        hand_over(ARRIVALS=0)


@pytest.mark.parametrize(
    ("broken", "kinds"),
    [
        (dict(THREADS=128), {HazardKind.RACE}),
        (dict(ARRIVALS=2), {HazardKind.BARRIER}),
        (dict(INDEX=1), {HazardKind.BARRIER}),
    ],
)
def test_misused_named_barriers_are_flagged(broken, kinds):
    assert kinds <= hazards_of(lambda: hand_over(**broken))


def stream(FIRST_PHASE=0, ARRIVALS=1, steps=5):
    target = torch.zeros(steps, 128, dtype=torch.int32)
    kernels.stream[(1,)](target, steps, FIRST_PHASE, ARRIVALS)
    return target


@pytest.mark.parametrize(
    ("schedule", "seed"), [*((name, 0) for name in SCHEDULES), *(("random", seed) for seed in range(1, 5))]
)
def test_mbarrier_phases_order_partitions(schedule, seed):
    with simulate(schedule, seed):
        target = stream()
    assert torch.equal(target, torch.arange(5, dtype=torch.int32)[:, None] + torch.arange(128, dtype=torch.int32))


def test_a_wait_for_the_wrong_phase_deadlocks():
    with pytest.raises(DeadlockError, match="phase"), simulate("eager"):
        stream(FIRST_PHASE=1)


def test_too_few_arrivals_deadlock():
    with pytest.raises(DeadlockError, match="1 of 1 arrivals"), simulate():
        stream(ARRIVALS=0)


def test_random_schedules_repeat_with_their_seed():

    def findings(seed):
        with simulate("random", seed, record_hazards=True) as sim:
            try:
                stream(ARRIVALS=2)
            except DeadlockError as error:
                return sim.hazards, str(error)
        return sim.hazards, None

    assert findings(3) == findings(3)
    assert len({findings(seed) for seed in range(8)}) > 1


def fill(programs=4, size=512, block=128, masked=False, overlap=0):
    target = torch.zeros(size)
    kernels.fill[lambda arguments: (programs,)](target, size, BLOCK=block, MASKED=masked, OVERLAP=overlap)
    return target


def test_programs_cover_the_grid():
    with simulate():
        assert torch.equal(fill(), torch.arange(4.0).repeat_interleave(128))


def test_masked_elements_are_not_stored():
    with simulate():
        assert torch.equal(fill(size=400, masked=True), torch.arange(4.0).repeat_interleave(128)[:400])


def test_pointers_out_of_bounds_are_flagged():
    assert hazards_of(lambda: fill(size=400)) == {HazardKind.BOUNDS}


def test_stores_of_two_programs_to_one_place_are_flagged():
    assert hazards_of(lambda: fill(overlap=1)) == {HazardKind.RACE}


def test_arithmetic_has_tritons_types():
    target, half = torch.zeros(6, dtype=torch.float64), torch.tensor([1.0078125]).bfloat16()
    large = 2**31 - 1
    with simulate():
        kernels.arithmetic[(1,)](target, large, half)
    third = (half.float() / 3).double().item()
    expected = [-2.0, 2.0 * large, (half * 3).item(), (half.float() * (half.float() * 3)).item(), third, -(large // 2)]
    assert target.tolist() == expected


def test_programs_stride_over_blocks():
    source, target, total = torch.randn(400), torch.full((400,), float("nan")), torch.zeros(1)
    with simulate():
        kernels.scaled_relu[(2,)](source, target, total, SIZE=400, BLOCK=128)
    expected = (3 * source - 1).relu()
    expected[-1] = 0
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(total[0], expected.sum())


def test_kernels_run_normally_outside_of_a_simulation():
    with simulate():
        stream()
    with pytest.raises(Exception, match=r"driver|GPU|CUDA|cpu tensor"):
        stream()


def test_unknown_assembly_is_refused():
    with pytest.raises(UnsupportedError, match="assembly"), simulate():
        kernels.hand_over[(1,)](torch.zeros(128, dtype=torch.int32), 8, "ex2.approx", 1)


def test_minimum_of_two_numbers():
    language = simulation_language.Language(lambda: None)
    assert int(language.minimum(3, 0)) == 0
    assert float(language.maximum(0.5, 2)) == 2.0
