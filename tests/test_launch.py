"""The launch path, on a GPU that is not there: our handles launch what Triton's JIT would have launched."""

import json
import os
import subprocess
import sys

import pytest

PRELUDE = """
import contextlib, json, threading, types, torch
from triton.runtime import driver
import tfkern
from tfkern import call, launch
from tfkern.backends import portable
from tfkern.bench import fake_gpu
from tfkern.kernels import features, flash_fwd

launched = []
fake_gpu.pretend(launcher=lambda *args: launched.append(args))
by_jit = []
JIT = type(flash_fwd.flash_fwd)
jit_run = JIT.run
JIT.run = lambda self, *a, **k: (by_jit.append(self.fn.__name__), jit_run(self, *a, **k))[1]

def tensors(b=2, h=3, n=40, d=64, dtype=torch.bfloat16, offset=0, **_):
    size = b * h * n * d
    return [torch.empty(size + 64, dtype=dtype)[offset : offset + size].view(b, h, n, d) for _ in range(3)]

def run(backward=True, dlse=False, options=None, **shape):
    q, k, v = tensors(**shape)
    p, t = call.build(q, k, v, **(options or {}))
    t = t._replace(seed=torch.zeros(2, dtype=torch.int64) if p.dropout_p else None)
    out, stats = portable.forward(p, t)
    if backward:
        needed = [x is not None for x in t[:6]]
        portable.backward(p, t, out, stats, torch.empty_like(out), torch.empty(q.shape[:3]) if dlse else None, needed)
    return q, k, v, out

def plain(args):  # a launch's arguments, pointers as numbers
    if isinstance(args, tuple):
        return tuple(plain(x) for x in args)
    if hasattr(args, "block_shape"):
        return args.base.data_ptr(), *args.shape, *args.strides, *args.block_shape
    return args.data_ptr() if isinstance(args, torch.Tensor) else args
"""


def script(code: str):
    """What the script prints last, as JSON."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE + code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PROBLEMS = """
problems = [
    dict(), dict(n=197), dict(b=1, h=1, n=16), dict(dlse=True), dict(offset=8), dict(offset=3), dict(d=40, offset=4),
    dict(dtype=torch.float32), dict(options=dict(is_causal=True, window=(4, None), scale=-0.3)),
    dict(options=dict(attn_mask=torch.zeros(41 * 40)[1:1601].view(40, 40))),
    dict(options=dict(attn_mask=torch.ones(40, 40) > 0)), dict(options=dict(alibi_slopes=torch.zeros(3), dropout_p=0.3)),
]
"""


@pytest.fixture(scope="module")
def compared():
    """For each problem: what the first call launched, by the JIT, beside what the JIT launches when asked again, and what our
    handle launches."""
    return script(
        PROBLEMS
        + """
def numbers(args):
    if isinstance(args, tuple):
        return [numbers(x) for x in args]
    return "pointer" if isinstance(args, int) and args > 2**22 else args  # a heap may begin right behind a program at 4 MiB
rows = []
for problem in problems:
    run(**problem)                       # compiles
    launched.clear(); by_jit.clear()
    run(**problem)                       # by our handles
    ours, jit_calls = [plain(x) for x in launched], list(by_jit)
    launched.clear()
    recorded = []
    ours_again = launch.Launch.__call__
    def through_jit(self, features=(), feature_tensors=(), **tensors):
        kernel = self.by_jit(features, **tensors)
        pointers = [None if x is None else x.data_ptr() for x in self.ordered(tensors)]
        recorded.append((self.handles.get(launch._form(pointers, feature_tensors)), kernel))
    launch.Launch.__call__ = through_jit
    run(**problem)                       # by the JIT
    launch.Launch.__call__ = ours_again
    theirs = [plain(x) for x in launched]
    rows.append(dict(
        jit_calls=jit_calls, launches=[len(ours), len(theirs)],
        same_kernels=[handle is not None and handle.kernel is kernel for handle, kernel in recorded],
        grids=[a[:3] for a in ours], same_grids=[a[:3] == b[:3] for a, b in zip(ours, theirs)],
        same_functions=[a[4:6] == b[4:6] for a, b in zip(ours, theirs)],
        # pointers differ from call to call; numbers, tuples and constants do not
        same_numbers=[numbers(a[9:]) == numbers(b[9:]) for a, b in zip(ours, theirs)],
    ))
print(json.dumps(rows))
"""
    )


def test_our_launch_is_the_jits(compared):
    for row in compared:
        assert not row["jit_calls"]
        assert row["launches"][0] == row["launches"][1] >= 3
        assert row["same_kernels"] == [True] * row["launches"][0]
        for what in ("same_grids", "same_functions", "same_numbers"):
            assert all(row[what]), what


def test_grids_have_one_dimension(compared):
    """More than 65,535 batch x heads is no limit: only a grid's first dimension is used."""
    assert all(grid[1:] == [1, 1] for row in compared for grid in row["grids"])


def test_a_new_length_needs_no_jit_and_an_unaligned_pointer_its_own_kernel():
    counts = script("""
counts = []
for problem in (dict(), dict(n=41), dict(n=1000, b=3, h=7), dict(offset=1), dict(offset=1, n=33), dict(offset=8)):
    by_jit.clear()
    run(**problem)
    counts.append(len(by_jit))
print(json.dumps(counts))
""")
    assert counts == [3, 0, 0, 3, 0, 0]


def test_on_amd_memory_beyond_2_gib_has_its_own_kernel():
    """There the JIT addresses smaller tensors with 32 bits."""
    counts = script("""
torch.version.hip = "7.0"
def on(*sizes):  # q, k and v as views of memory of so many numbers
    return lambda **_: [torch.empty(size, dtype=torch.bfloat16)[:15360].view(2, 3, 40, 64) for size in sizes]
def lengths(size):
    return dict(key_lengths=torch.empty(size, dtype=torch.int64)[:2].fill_(40))
few, most, beyond = 15360, 2**30 - 1, 2**30
counts = []
for tensors, options in (
    (on(few, few, few), {}), (on(most, most, most), {}), (on(beyond, beyond, beyond), {}), (on(few, few, beyond), {}),
    (on(few, few, few), {}), (on(beyond, beyond, beyond), {}), (on(few, few, few), lengths(2)), (on(few, few, few), lengths(2**28)),
):
    by_jit.clear()
    run(options=options)
    counts.append(len(by_jit))
print(json.dumps(counts))
""")
    assert counts == [3, 0, 3, 3, 0, 0, 3, 3]


def test_a_profilers_hook_hears_of_every_launch():
    heard = script("""
from triton import knobs
run()
chain = knobs.runtime.launch_enter_hook
hook = lambda metadata: None
chain.add(hook)
launched.clear()
run(); run()
heard = [a[6].get()["name"] for a in launched if a[7] is chain]
chain.remove(hook)
launched.clear()
run()
print(json.dumps([heard, [a[7] for a in launched]]))
""")
    assert heard == [["flash_fwd", "flash_bwd_dq", "flash_bwd_dkdv"] * 2, [None] * 3]


def test_threads():
    """Many threads, many shapes at once: every launch has its own call's pointers and grid."""
    wrong = script("""
wrong = []
def work(n):
    for i in range(30):
        q, k, v = tensors(n=n + i % 3)
        p, t = call.build(q, k, v)
        out, _ = portable.forward(p, t)
        found = [a for a in launched if a[9] == q.data_ptr() and a[12] == out.data_ptr()]
        if not found or found[-1][0] != 6 * -(-(n + i % 3) // 128):
            wrong.append((n, i))
        keep.append((q, out))
keep = []
run()
threads = [threading.Thread(target=work, args=(40 * i,)) for i in range(1, 9)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps(wrong))
""")
    assert wrong == []


def test_the_tensors_device_and_its_stream():
    seen = script("""
class Driver(fake_gpu.Driver):
    current = 0
    def get_current_device(self): return self.current
    def get_current_stream(self, device): return 100 + 10 * device + self.current
active = Driver(90, lambda *args: launched.append(args))
driver.set_active(active)
@contextlib.contextmanager
def device(d):
    before, active.current = active.current, d.index
    yield
    active.current = before
torch.cuda.device = device
q = tensors()[0]
def launch_on(index):
    p, t = call.build(q, q, q)
    l = portable._plan_forward(p, t)[0]
    on = launch.Launch(l.kernel, l.grid, types.SimpleNamespace(index=index), l.names, l.numbers, l.constants, l.options)
    out = torch.empty_like(q); stats = torch.empty(*q.shape[:2], 2, q.shape[2])
    for _ in range(3): on(features.NONE, Q=q, K=q, V=q, O=out, STATS=stats)
launch_on(0); launch_on(1); active.current = 1; launch_on(0)
print(json.dumps([[a[3] for a in launched], len(launch._handles)]))
""")
    assert seen == [[100] * 3 + [111] * 3 + [100] * 3, 2]
