"""The table of tiles: where each row comes from, what it must not do, and how `tfkern bench sweep` chooses."""

import math
import sys
import types

import pytest

from tfkern import configs, tiles
from tfkern.bench import chips
from tfkern.bench.static import aot, candidates, geometry, machine_code, sass, sweep

ROWS = {
    (arch, kernel, size, head_dim): configs.tile_config(arch, kernel, size, head_dim)
    for arch in tiles.ARCHITECTURES
    for kernel in tiles.KERNELS
    for size in (2, 4)
    for head_dim in tiles.HEAD_DIM_CLASSES
}


def owned(kernel: str, config) -> int:
    return config.block_n if kernel == "flash_bwd_dkdv" else config.block_m


def test_every_row_tells_where_it_comes_from():
    assert all(config.source for config in ROWS.values())


def test_a_warp_has_rows_of_its_own():
    """Sixteen at least, as a matrix instruction of one warp has: with fewer, warps share rows, make their products twice or
    reduce together. Sums of 256 columns take more warps' registers."""
    for (arch, kernel, size, head_dim), config in ROWS.items():
        if size == 2 and head_dim < 256 and kernel != "flash_bwd_dbias":
            assert owned(kernel, config) >= 16 * config.num_warps, (arch, kernel, head_dim, config)


def test_what_a_pass_streams_fits_into_shared_memory():
    """In as many buffers as there are stages, if nothing else did. The compile gate has the exact bytes."""
    for (arch, kernel, size, head_dim), config in ROWS.items():
        if kernel != "flash_bwd_dbias":
            streamed = config.block_m if kernel == "flash_bwd_dkdv" else config.block_n
            assert config.num_stages * 2 * streamed * head_dim * size <= tiles.SHARED[arch], (arch, kernel, size, head_dim)


def test_a_lighter_tile_is_no_heavier_in_anything():
    """It has at least 16 rows, as a matrix instruction has; each warp has 16 of its own if it had before; no warp holds more
    scores than it did."""
    for (arch, kernel, size, head_dim), config in ROWS.items():
        lighter = configs.tile_config(arch, kernel, size, head_dim, heavy=True)
        at = arch, kernel, size, head_dim, lighter
        assert 16 <= owned(kernel, lighter) <= max(16, owned(kernel, config)), at
        assert 4 <= lighter.num_warps <= config.num_warps, at
        assert lighter.num_stages == config.num_stages, at
        assert lighter.block_m * lighter.block_n * config.num_warps <= config.block_m * config.block_n * lighter.num_warps, at
        if owned(kernel, config) >= 16 * config.num_warps and lighter.num_warps > 4 and head_dim < 256:
            assert owned(kernel, lighter) >= 16 * lighter.num_warps, at
        if kernel != "flash_bwd_dbias" and owned(kernel, config) > 16:
            assert owned(kernel, lighter) < owned(kernel, config), at


TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#linear = #ttg.linear<{register = [[0, 1]], lane = [[1, 0]], warp = [[16, 0], [32, 0]], block = []}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 4], instrShape = [16, 8]}>
module {
  tt.func public @f() {
    %0 = "tt.reduce"(%a) <{axis = 1 : i32}> ({
    ^bb0(%x: f32, %y: f32):
      tt.reduce.return %z : f32
    }) : (tensor<64x64xf32, #mma>) -> tensor<64xf32, #ttg.slice<{dim = 1, parent = #mma}>>
    scf.for %i = %c0 to %c1 step %c2 {
      %1 = "tt.reduce"(%b) <{axis = AXIS : i32}> ({
      ^bb0(%x: f32, %y: f32):
        tt.reduce.return %z : f32
      }) : (tensor<64x64xf32, #LAYOUT>) -> tensor<64xf32, #ttg.slice<{dim = 1, parent = #LAYOUT}>>
    }
  }
}
"""


@pytest.mark.parametrize(
    ("layout", "axis", "across"),
    [
        ("blocked", 1, False),
        ("blocked", 0, True),
        ("mma", 1, True),
        ("mma", 0, False),
        ("linear", 1, False),
        ("linear", 0, True),
    ],
)
def test_reductions_across_warps_are_found(layout, axis, across):
    """In loops only: one outside, as of delta, is made once."""

    compiled = types.SimpleNamespace(asm={"ttgir": TTGIR.replace("LAYOUT", layout).replace("AXIS", str(axis))})
    assert aot.reduces_across_warps(compiled) is across


def test_the_outermost_loop_of_the_biases_gradient():
    """Its inner loops run once each: what is in the one over batches counts."""
    text = ["NOP", "LDG.E R1", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "BRA 0x20", "NOP", "BRA 0x10", "EXIT"]
    code = sass.parse("".join(f"/*{16 * i:04x}*/ {x} ;\n" for i, x in enumerate(text)))
    assert [len(body) for body in machine_code.loops(code, sass.MULTIPLY)] == [2]
    assert [len(body) for body in machine_code.loops(code, sass.MULTIPLY, outermost=True)] == [5]


def test_loops_that_overlap_are_one_nest():
    """Where a compiler moves a loop's head behind its body, as for AMD, neither of two jumps back spans the other. Loops one
    behind the other stay two."""
    product = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
    text = ["NOP", "NOP", product, product, "BRA 0x10", "NOP", "BRA 0x30", "NOP", product, "BRA 0x80", "EXIT"]
    code = sass.parse("".join(f"/*{16 * i:04x}*/ {x} ;\n" for i, x in enumerate(text)))
    for outermost in (False, True):
        assert [len(body) for body in machine_code.loops(code, sass.MULTIPLY, outermost)] == [6, 2]


def test_work_of_the_biases_gradient():
    """Two heads of 100 x 100 in tiles of 64 x 32 are 2 x 4 programs each, of which a causal mask leaves 2 + 4."""
    config = configs.TileConfig(64, 32)
    full, causal = (geometry.work("flash_bwd_dbias", config, geometry.Problem(5, 2, 100, 16, c)) for c in (False, True))
    assert (full.programs, full.passes, full.longest) == (16, (80,), 5)
    assert (causal.programs, causal.passes) == (16, (60,))
    assert full.loaded == 80 * (2 * (64 + 32) * 16 + 64 * 32) * 2


def test_spilled_numbers_take_the_path_of_shared_memory():
    (spill, product) = sass.parse("/*0000*/ STL.64 [R1], R2 ;\n/*0010*/ FFMA R1, R2, R3, R4 ;")
    assert sass.busy([spill], 4, 0)["shared"] == 4 * 256 / 128
    assert "shared" not in sass.busy([product], 4, 0)


def test_chips_of_graphics_cards_multiply_slower():
    """Than an A100, the chip whose mma.sync the cycles are of; its vector pipes are slower than an H100's."""
    data_center = chips.MACHINES["sm_80"]
    assert data_center.mma == chips.MACHINES["sm_90"].mma
    assert data_center.fp32 < chips.MACHINES["sm_90"].fp32
    for arch in ("sm_86", "sm_89", "sm_120"):
        machine = chips.MACHINES[arch]
        assert machine.mma < data_center.mma
        assert machine.mma == machine.multiply_adds
        assert machine.shared > tiles.SHARED[arch]


ROW = sweep.Row("sm_80", "flash_fwd", "bf16", 64)


def found(us: float, **more) -> dict:
    times = {str(n): us for n in sweep.LENGTHS}
    return (
        dict(registers=128, spilled=0, shared=1024, across=False, occupancy=4, us=times, bound=dict.fromkeys(times, "latency"))
        | more
    )


def known(times: dict[tuple, dict]) -> sweep.Sweep:
    """A sweep that has found this of some tiles (or one thing of each variant), and of all others that they are slow."""
    result = sweep.Sweep(None, until=-math.inf)
    for tile in {*candidates.of("flash_fwd"), *sweep.table(ROW), *times}:
        each = times.get(tile, found(100.0))
        for variant, what in zip(sweep.VARIANTS, each if isinstance(each, tuple) else (each, each), strict=True):
            result.known[ROW, tile, variant] = what
    return result


FAST, OTHER = (64, 64, 4, 3), (64, 64, 4, 2)


def test_a_sweep_goes_on_from_the_best_tile_to_its_other_stages():
    """Another number of stages is tried only of the best tiles: the first step has two."""
    swept = known({FAST: found(5.0), OTHER: found(10.0), (128, 32, 4, 1): found(1.0)})
    last = swept.run(ROW)
    assert last[:2] == [FAST, OTHER]
    assert set(sweep.table(ROW)) <= set(last)
    assert swept.chosen(ROW, last) == FAST
    assert swept.rank(ROW, FAST) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("best", "taken"),
    [
        ({}, FAST), (dict(spilled=8), OTHER), (dict(across=True), OTHER), (dict(registers=129), OTHER),
        (dict(us=dict.fromkeys(map(str, sweep.LENGTHS), 9.0), spilled=8), FAST),  # more than 3% faster
        (dict(us=dict.fromkeys(map(str, sweep.LENGTHS), 9.0), spilled=sweep.MAX_SPILLED + 1), OTHER),
        (dict(problem="does not compile"), OTHER),
    ],
)  # fmt: skip
def test_among_nearly_equal_candidates_the_lighter_is_chosen(best, taken):
    swept = known({FAST: found(9.9) | best, OTHER: found(10.0)})
    assert swept.chosen(ROW, swept.run(ROW)) == taken


def test_too_many_spilled_bytes_under_a_causal_mask_count_too():
    swept = known({FAST: (found(5.0), found(5.0, spilled=sweep.MAX_SPILLED + 1)), OTHER: found(10.0)})
    assert swept.chosen(ROW, swept.run(ROW)) == OTHER


def test_what_the_table_has_stays_unless_another_is_faster_or_lighter():
    (table,) = sweep.table(ROW)
    for us, spilled, taken in ((9.9, 0, table), (9.0, 0, FAST), (9.9, 8, table)):
        swept = known({FAST: found(us, registers=64, spilled=spilled), table: found(10.0)})
        assert swept.chosen(ROW, swept.run(ROW)) == taken
    swept = known({FAST: found(9.9), table: found(10.0, spilled=8)})
    assert swept.chosen(ROW, swept.run(ROW)) == FAST


def test_a_sweep_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    done, limit = [], [4]

    def evaluate(row, config, variant):
        if len(done) == limit[0]:
            raise TimeoutError
        done.append((config.block_m, config.block_n, config.num_warps, config.num_stages, variant))
        return found(float(config.block_m))

    monkeypatch.setattr(sweep, "evaluate", evaluate)
    store = tmp_path / "found.jsonl"
    with pytest.raises(TimeoutError):
        sweep.Sweep(store).run(ROW)
    assert len(store.read_text().splitlines()) == 4
    limit[0] = math.inf
    last = sweep.Sweep(store).run(ROW)
    assert len(done) == len(set(done)) == len(store.read_text().splitlines())
    assert sweep.Sweep(store, until=-math.inf).run(ROW) == last  # nothing is left to do


def test_the_command_prints_what_is_chosen(tmp_path, monkeypatch, capsys):
    summary, store = tmp_path / "summary.md", tmp_path / "found.jsonl"
    monkeypatch.setattr(sweep, "evaluate", lambda row, config, variant: found(5.0 if config.block_n == 128 else 10.0))
    command = ["sweep.py", "--arch", *ROW[:1], "--kernel", "flash_fwd", "--store", str(store), "--summary", str(summary)]
    monkeypatch.setattr(sys, "argv", command)
    assert sweep.main() == 0
    (chosen,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert "128x128 w8" in chosen
    assert "rank     5.0 us" in chosen
    head, rule, line = summary.read_text().splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| sm_80 | flash_fwd | bf16 | 64 | 64x32 w4 s2 | 128x128 w8 ")
    store.unlink()
    monkeypatch.setattr(sys, "argv", [*command, "--seconds", "0"])
    assert sweep.main() == 3
