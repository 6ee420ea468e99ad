"""The compile gate: every kernel that configs.py can choose, compiled for GPUs that are not here, within its spill bounds.
And: a new length, window, batch or head count compiles nothing new."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tfkern import configs, tiles

ROOT = Path(__file__).resolve().parent.parent
COMPILER = {**os.environ, "TRITON_INTERPRET": "0"}


def gate(tmp_path, *arguments) -> list[dict]:
    """Run the compile gate, which must find nothing wrong, and return its rows."""
    table = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench.static.compile_gate", *arguments, "--json", table]
    done = subprocess.run(command, capture_output=True, text=True, env=COMPILER, cwd=ROOT, check=False)
    rows = json.loads(table.read_text()) if table.exists() else []
    assert done.returncode == 0, [row for row in rows if row["problem"]] or done.stderr
    assert not [row for row in rows if row["problem"]]
    return rows


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_gate_at_the_main_head_dim(arch, tmp_path):
    """Every kernel with all of the band: what `make test` has of the gate."""
    rows = gate(tmp_path, "--arch", arch, "--dtype", "bf16", "--head-dim", "64", "--variant", "all")
    assert {row["kernel"] for row in rows} >= set(configs.KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])  # `make gate` compiles for sm_100, which takes longest
def test_gate(arch, kernel, tmp_path):
    variants = ["plain", "causal", "all"] if arch == "sm_90" else ["all"]  # `make gate` compiles the others
    rows = gate(tmp_path, "--arch", arch, "--kernel", kernel, "--variant", *variants)
    assert len(rows) == 2 * len(tiles.HEAD_DIM_CLASSES) * len(variants)  # dtypes x head dims x variants
    if arch in ("sm_80", "sm_90") and kernel == "flash_fwd":  # its softmax stays within a warp, but for sums of 256 columns
        assert {row["head_dim"] for row in rows if row["across"] and row["dtype"] == "bf16"} <= {256}


@pytest.mark.parametrize(
    ("arch", "variant", "head_dims"),
    [("sm_120", "plain", ["256"]), *((arch, "all", ["64", "128", "256"]) for arch in ("sm_86", "sm_89", "sm_120"))],
)
@pytest.mark.slow
def test_gate_of_chips_with_little_shared_memory(arch, variant, head_dims, tmp_path):
    """Graphics cards: a program may have 99 KiB, where an A100's may have 163."""
    assert tiles.SHARED[arch] == 99 * 1024
    rows = gate(tmp_path, "--arch", arch, "--dtype", "bf16", "--head-dim", *head_dims, "--variant", variant)
    assert len(rows) == len(tiles.KERNELS) * len(head_dims)
    assert all(0 < row["shared"] <= 99 * 1024 for row in rows)


def test_no_chip_gets_the_rows_of_one_with_more_shared_memory():
    """One that nobody has thought of gets those of the chip that has least."""
    for arch, bytes_there in tiles.SHARED.items():
        assert tiles.SHARED[configs.table_arch(arch)] <= bytes_there, arch
    least = min(there for arch, there in tiles.SHARED.items() if arch.startswith("sm_"))
    assert all(tiles.SHARED[configs.table_arch(f"sm_{n}")] == least for n in (89, 110, 121, 130))
    assert {configs.table_arch(arch) for arch in ("gfx950", "gfx1100")} == {"gfx942"}


@pytest.mark.slow
def test_gate_of_the_backward_in_one_pass(tmp_path):
    """Where the table has tiles for it; it never runs with free strides, and on a GPU not with what takes registers a score."""
    rows = gate(tmp_path, "--kernel", "flash_bwd_one_pass", "--dtype", "bf16", "--variant", "plain", "causal", "all", "sinks")
    table = configs.one_pass_tiles("sm_90", 2, 64)
    assert [row["config"]["block_n"] for row in rows] == [c.block_n for c in table] * 4
    assert {(row["arch"], row["head_dim"]) for row in rows} == {("sm_90", 64)}


PROBLEMS = list(
    itertools.product((*tiles.ARCHITECTURES, "interpreter"), (2, 4), tiles.HEAD_DIM_CLASSES, (1, 64, 10**4), (False, True))
)


def test_one_pass_holds_every_key():
    """In the smallest tile that does; where one pass is taken it is taken with fewer keys, with more programs and with less to
    do for a score as well."""

    def taken(arch, itemsize, head_dim, programs, heavy, n_k):
        return configs.one_pass(arch, itemsize, head_dim, n_k, programs, heavy)

    some = 0
    for problem in PROBLEMS:
        arch, itemsize, head_dim, programs, _ = problem
        assert taken(*problem, n_k=0) is None
        before = True
        for n_k in range(1, 300):
            config = taken(*problem, n_k=n_k)
            assert before or not config
            before = config
            if config:
                some += 1
                held = [one.block_n for one in configs.one_pass_tiles(arch, itemsize, head_dim)]
                assert config.block_n == min(keys for keys in held if keys >= n_k)
                assert taken(arch, itemsize, head_dim, 10 * programs, False, n_k) == config
    assert some


def test_one_pass_leaves_no_chip_idle():
    """And on a GPU does not take what spills; in the interpreter, where tests run, both are gone through."""
    for arch, itemsize, head_dim, programs, heavy in PROBLEMS:
        if configs.one_pass(arch, itemsize, head_dim, 32, programs, heavy) and arch != "interpreter":
            assert programs >= 100
            assert not heavy
    assert configs.one_pass("interpreter", 2, 64, 32, 1, heavy=True)


def test_tiles_of_one_pass_may_be_overridden():
    for problem in PROBLEMS:
        arch, itemsize, head_dim, programs, heavy = problem
        with configs.override(flash_bwd_one_pass=(mine := configs.TileConfig(16, 32))):
            found = [configs.one_pass(arch, itemsize, head_dim, n_k, programs, heavy) for n_k in (32, 33)]
        assert found == [mine, None]
        with configs.override(flash_bwd_one_pass=None):
            assert configs.one_pass(arch, itemsize, head_dim, 1, programs, heavy) is None


@pytest.mark.slow
def test_gate_of_descriptors(tmp_path):
    """Where the table has tiles for them; only what TMA can cut is in the kernel then."""
    rows = gate(
        tmp_path,
        "--arch",
        "sm_80",
        "sm_90",
        "--kernel",
        configs.DESCRIBED,
        "--dtype",
        "bf16",
        "--variant",
        "plain",
        "causal",
        "all",
    )
    assert {(row["arch"], row["variant"]) for row in rows} == {("sm_90", "plain"), ("sm_90", "causal")}
    assert {row["head_dim"] for row in rows} == {d for arch, _, d in tiles.DESCRIPTOR_TABLE if arch == "sm_90"}
    assert all(row["registers"] <= 168 for row in rows if row["config"]["registers"])


def test_descriptors_are_for_devices_that_have_them():
    """For two bytes a number, which is what the kernel's blocks are laid out for. Whoever overrides the tiles of flash_bwd_dkdv
    gets those and no descriptors."""
    mine = configs.TileConfig(16, 32)
    for arch in ("sm_80", "sm_86", "sm_89", "gfx942"):
        for head_dim in tiles.HEAD_DIM_CLASSES:
            assert configs.described(arch, 2, head_dim) is None
            with configs.override(flash_bwd_dkdv_described=mine):
                assert configs.described(arch, 2, head_dim) is None
    for arch, itemsize, head_dim in tiles.DESCRIPTOR_TABLE:
        assert itemsize == 2
        assert configs.described(arch, 2, head_dim)
        assert configs.described(arch, 4, head_dim) is None
        with configs.override(flash_bwd_dkdv=mine):
            assert configs.described(arch, 2, head_dim) is None
        with configs.override(flash_bwd_dkdv=mine, flash_bwd_dkdv_described=mine):
            assert configs.described(arch, 2, head_dim) == mine
            assert configs.described(arch, 4, head_dim) is None


@pytest.mark.slow
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_gate_of_the_features(kernel, tmp_path):
    """Each feature by itself, and all together, at the head dim that matters most. `make gate` has more."""
    rows = gate(tmp_path, "--arch", "sm_90", "--kernel", kernel, "--dtype", "bf16", "--head-dim", "64", "--variant", "features")
    assert {row["variant"] for row in rows} >= {"mask", "bias", "dropout", "packed", "softcap", "slopes", "sinks", "score-mod"}


# Instructions that the formula of a feature needs for each score, at the very least.
NEEDED = {"mask": 2, "bias": 2, "bias-any": 2, "dropout": 8, "softcap": 16, "slopes": 3, "score-mod": 8}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"])
def test_an_absent_feature_leaves_no_code(kernel):
    """With the same tiles, a kernel without a feature is shorter than with it by what the feature computes."""
    code = f"""
import json
from bench.static import compile_gate as gate
config = gate.configs.TileConfig(64, 64, 4, 1)
heavy = [name for name in gate.FEATURES if gate.VARIANTS[name] & gate.HEAVY and name != "everything"]
rows = [gate.run("sm_90", "{kernel}", "bf16", 64, config, variant, {{}}) for variant in ("plain", *heavy)]
print(json.dumps({{row["variant"]: row["instructions"] for row in rows}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=COMPILER, cwd=ROOT, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    plain, scores = rows.pop("plain"), 64 * 64 // 128  # of a thread, in one pass
    added = {name: instructions - plain for name, instructions in rows.items()}
    assert added.keys() == NEEDED.keys()
    assert not {name: n for name, n in added.items() if n < NEEDED[name] * scores}


def test_gate_fails_on_what_it_should(tmp_path):
    """A tile far too large must be reported, not waved through."""
    code = """
from bench.static import compile_gate as gate
config = gate.configs.TileConfig
spilling = gate.run("sm_90", "flash_fwd", "bf16", 128, config(128, 128, 4, 2), "plain", {})
large = gate.run("sm_90", "flash_fwd", "bf16", 128, config(64, 64, 8, 9), "plain", {})
print(spilling["problem"]); print(large["problem"])
for bounds in ({gate.name(spilling): 9999}, {gate.own_name(spilling): 9999}, {gate.name(spilling): 9999, gate.own_name(spilling): 1}):
    print(gate.problem(spilling, bounds))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=COMPILER, cwd=ROOT, check=True)
    first, second, *with_bounds = done.stdout.splitlines()
    assert first.startswith("spills ")
    assert "bytes of shared memory" in second
    assert with_bounds == ["None", "None", first.replace(" 0 ", " 1 ")]  # that of this Triton alone goes first


def test_every_architecture_finds_a_row():
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "interpreter"):
        for kernel in configs.KERNELS:
            for itemsize in (2, 4):
                for head_dim in (1, 16, 17, 64, 80, 128, 129, 256):
                    config = configs.tile_config(arch, kernel, itemsize, configs.head_dim_class(head_dim))
                    assert min(config.block_m, config.block_n) >= 16


def test_override_is_undone_and_checked():
    small = configs.TileConfig(16, 16)
    with configs.override(flash_fwd=small):
        assert configs.tile_config("sm_90", "flash_fwd", 2, 64) == small
        assert configs.tile_config("sm_90", "flash_bwd_dq", 2, 64) != small
    assert configs.tile_config("sm_90", "flash_fwd", 2, 64) != small
    with pytest.raises(ValueError, match="no kernel is called"), configs.override(flash=small):
        pass


FAKE_GPU = """
import json, torch
from tfkern import call as calls
from tfkern.backends import portable
from tfkern.bench import fake_gpu
from tfkern.kernels import flash_bwd_dbias, flash_bwd_dkdv, flash_bwd_dq, flash_fwd

fake_gpu.pretend()
kernels = (flash_fwd.flash_fwd, flash_bwd_dq.flash_bwd_dq, flash_bwd_dkdv.flash_bwd_dkdv, flash_bwd_dbias.flash_bwd_dbias)
def count():
    counts = {k.fn.__name__: sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels}
    return {name: n for name, n in counts.items() if n}

def call(b, h, h_k, n_q, n_k, d, packed=False, mask=None, lengths=None, **options):
    def make(heads, n):
        if packed:
            return torch.empty(b, n, 3, heads, d, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)[1]
        return torch.empty(b, heads, n, d, dtype=torch.bfloat16)
    q, k, v = make(h, n_q), make(h_k, n_k), make(h_k, n_k)
    if mask is not None:
        options["attn_mask"] = torch.zeros(*mask, n_q, n_k)
    if lengths is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        options["cu_seqlens_q"] = options["cu_seqlens_k"] = torch.tensor([0] * lengths + [n_q], dtype=torch.int32)
    p, t = calls.build(q, k, v, enable_gqa=True, **options)
    t = t._replace(seed=torch.zeros(2, dtype=torch.int64) if p.dropout_p else None)
    out, stats = portable.forward(p, t)
    portable.backward(p, t, out, stats, torch.empty_like(out), None, [x is not None for x in t[:6]])

def compiled(calls):
    for c in calls: c()
    return count()

counts = []
base = lambda **o: [lambda n=n, b=b, h=h, o=o: call(b, h, h, n, n, 64, **o) for n in (1, 2, 15, 16, 17, 64, 197, 512, 1000, 1024) for b, h in ((1, 1), (2, 12), (16, 16))]
counts.append(compiled([lambda: call(2, 12, 12, 512, 512, 64)]))
counts.append(compiled(base()))                                             # any length, batch, heads
counts.append(compiled(base(packed=True)))                                  # any memory order
counts.append(compiled([lambda: call(2, 12, 4, 100, 333, 64, scale=-1.0)])) # groups, Nq != Nk, scale
counts.append(compiled([lambda: call(2, 4, 4, 64, 64, 64, is_causal=True)]))# one new variant: right is there
counts.append(compiled([lambda r=r: call(2, 4, 4, 77, 99, 64, window=(None, r), causal_alignment="lower_right") for r in (0, 1, 16, 100, 10**9)]))
sizes = [(2, 4, 4, n, n, 64) for n in (16, 64, 197, 1000)]
def added(*more):  # by the same call with other numbers
    before = count()
    for size in sizes:
        for options in more: call(*size, **options)
    return {name: n - before.get(name, 0) for name, n in count().items() if n != before.get(name, 0)}
counts.append([
    added(dict(dropout_p=0.1), dict(dropout_p=0.7)),
    added(dict(softcap=1.0), dict(softcap=30.0)),
    added(dict(alibi_slopes=torch.zeros(4)), dict(alibi_slopes=torch.zeros(2, 4))),
    added(dict(sinks=torch.zeros(4))),
    added(dict(lengths=1), dict(lengths=7), dict(lengths=16)),
    added(dict(scale=torch.tensor(1.0)), dict(scale=torch.tensor(-3.0))),
    added(dict(mask=(2, 4)), dict(mask=(1, 4)), dict(mask=())),
])
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_new_numbers_compile_nothing_new():
    done = subprocess.run([sys.executable, "-I", "-c", FAKE_GPU], capture_output=True, text=True, env=COMPILER, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    kernels = ("flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv")
    one, two = (dict.fromkeys(kernels, n) for n in (1, 2))
    # any length is one form of each kernel, but few keys of enough heads: those have one more, the backward in one pass
    forms = [one, *({**n, "flash_bwd_dkdv": n["flash_bwd_dkdv"] + 1} for n in (one, one, one, two, two))]
    assert counts[:6] == forms
    # a feature is one form, whatever its numbers; a mask is two, with rows that are aligned and with rows that are not
    assert counts[6] == [one] * 6 + [{**two, "flash_bwd_dbias": 2}]
