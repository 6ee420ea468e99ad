"""The benchmark's machinery: nothing wrong is timed, nobody is left out in silence, results can be drawn again."""

import contextlib
import functools
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

import tfkern
from tfkern import cli, reference, testing
from tfkern.bench import faults, plots, providers, runner, timing, verify
from tfkern.bench.gpu import repeats
from tfkern.bench.shapes import Shape

TINY = Shape("tiny", 2, 3, 40, 16, is_causal=True)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(runner, "CPU_SHAPES", [TINY])
    monkeypatch.setattr(runner, "GPU_SHAPES", [TINY])


def test_rows(tiny, device):
    rows = list(runner.run(torch.float32, torch.device(device), seconds=0.01))
    assert {row["provider"] for row in rows} == set(providers.PROVIDERS)
    timed = [row for row in rows if "ms" in row]
    assert {row["provider"] for row in timed} >= {"tfkern eager", "sdpa default", "sdpa math", "naive"}
    assert all(row["p20"] <= row["ms"] <= row["p80"] for row in timed)
    assert all(row.get("skipped") for row in rows if "ms" not in row)


def rows_of(monkeypatch, device, name: str, function) -> list[dict]:
    """What becomes of a provider by a name."""
    monkeypatch.setitem(providers.PROVIDERS, name, lambda shape, dtype, device: function)
    return list(runner.figures(name, TINY, torch.float32, torch.device(device), seconds=0.01))


def naive(q, k, v, is_causal=True):
    return reference.attention(q, k, v, is_causal=is_causal)


class WrongBackward(torch.autograd.Function):
    """Attention whose dq is NaN."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return naive(q, k, v)

    @staticmethod
    def backward(ctx, do):
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            _, dk, dv = torch.autograd.grad(naive(*leaves), leaves, do)
        return torch.full_like(dk, torch.nan), dk, dv


def test_wrong_results_are_not_timed(monkeypatch, device):
    rows = rows_of(monkeypatch, device, "peer", lambda q, k, v: naive(q, k, v, is_causal=False))
    assert [row["direction"] for row in rows] == ["forward", "backward", "forward+backward"]
    assert rows[0]["skipped"].startswith("wrong results: out: error")
    assert rows[2]["skipped"].startswith("wrong results: dq: error")
    assert not any("ms" in row or "problem" in row for row in rows)  # a peer's fault is not ours


def test_wrong_gradients_alone_are_not_timed(monkeypatch, device):
    forward, *backward = rows_of(monkeypatch, device, "tfkern wrong", WrongBackward.apply)
    assert forward["ms"] > 0
    assert all(row["problem"].startswith("wrong results: dq: error nan") for row in backward)
    assert not any("ms" in row for row in backward)


def test_what_is_verified_is_all_of_what_is_timed(monkeypatch, device):
    """One head of one batch wrong, and only where there are as many as in what is timed."""

    def wrong_at_the_end(q, k, v):
        out = naive(q, k, v)
        if q.shape == (TINY.batch, TINY.heads, TINY.length, TINY.head_dim):
            out = torch.cat([out.flatten(0, 1)[:-1], out.flatten(0, 1)[-1:] * 1.001]).view(out.shape)
        return out

    rows = rows_of(monkeypatch, device, "tfkern wrong", wrong_at_the_end)
    assert all(row["problem"].startswith("wrong results") for row in rows)
    assert all("ms" in row for row in rows_of(monkeypatch, device, "tfkern right", naive))


@pytest.mark.parametrize("scores", [1, 1600, 5000, 2**27])
def test_the_oracle_has_every_head_once_and_few_at_a_time(monkeypatch, scores):
    monkeypatch.setattr(verify, "SCORES", scores)
    seen = torch.zeros(TINY.batch, TINY.heads)
    for batches, heads in verify.parts(TINY):
        seen[batches, heads] += 1
        assert seen[batches, heads].numel() * TINY.length**2 <= max(scores, TINY.length**2)
    assert (seen == 1).all()


def test_a_provider_that_fails_is_a_row(monkeypatch, device):
    def failing(message):
        def attention(q, k, v):
            raise RuntimeError(message)

        return attention

    for name in ("peer", "tfkern x"):
        (row,) = rows_of(monkeypatch, device, name, failing("out of memory\nand more"))
        assert row["skipped"] == "failed: RuntimeError: out of memory"
    (row,) = rows_of(monkeypatch, device, "peer", failing("no such kernel"))
    assert row["skipped"] == "failed: RuntimeError: no such kernel"
    for name, message in (("tfkern x", "it broke"), ("peer", "CUDA error: an illegal memory access was encountered")):
        with pytest.raises(RuntimeError, match=message):
            rows_of(monkeypatch, device, name, failing(message))


def test_errors_of_cuda_and_of_memory():
    sticky = [
        "CUDA error: an illegal memory access was encountered", "Triton Error [CUDA]: misaligned address", "AcceleratorError: x",
        "CUDA error: operation not permitted when stream is capturing", "cuDNN: CUDNN_STATUS_EXECUTION_FAILED",
    ]  # fmt: skip
    for text in sticky:
        assert faults.is_sticky(RuntimeError(text))
        assert not faults.is_out_of_memory(RuntimeError(text))
    for text in (
        "CUDA error: out of memory",
        "CUDA out of memory. Tried to allocate 2 GiB",
        "Triton Error [CUDA]: out of memory",
    ):
        assert faults.is_out_of_memory(RuntimeError(text))
        assert not faults.is_sticky(RuntimeError(text))
    assert not faults.is_sticky(RuntimeError("no such kernel"))
    assert faults.is_compilers(OutOfResources(300000, 232448, "shared memory"))
    assert faults.is_compilers(RuntimeError("PassManager::run failed"))
    assert not any(map(faults.is_compilers, map(RuntimeError, (*sticky, "it broke"))))
    error = ValueError("failed")
    error.__cause__ = RuntimeError(sticky[0])
    assert faults.is_sticky(error)


def test_the_default_names_its_choice(device):
    rows = list(runner.figures("sdpa default", TINY, torch.float32, torch.device(device), seconds=0.01))
    assert [row["kernels"] for row in rows] == [["FLASH_ATTENTION"]] * 3  # on a CPU
    q, k, v, _ = TINY.inputs(torch.float32, device)
    with sdpa_kernel(SDPBackend.MATH):
        assert providers.default_choice(q, k, v, is_causal=True) == "MATH"


def test_our_rows_name_kernels_and_tiles(monkeypatch, device):
    monkeypatch.setattr(timing, "milliseconds", lambda *_: (1.0, 1.0, 1.0))
    rows = list(runner.figures("tfkern portable", Shape("one", 1, 1, 20, 16), torch.float32, torch.device(device), 0.01))
    found = {row["direction"]: row["kernels"] for row in rows}
    assert found["forward"] == ["flash_fwd 64x32 w4 s2"]
    assert found["backward"] == ["flash_bwd_dkdv 32x64 w4 s2"]  # one pass
    assert found["forward+backward"] == found["forward"] + found["backward"]


def test_flex_that_would_run_unfused_is_refused(monkeypatch):
    """Beyond Dynamo's limit of recompilations."""
    stand_in = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    shapes = [replace(TINY, is_causal=False, length=n) for n in (40, 41, 42)]
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for shape in shapes:  # each compiles anew
            q, k, v = (x.detach() for x in shape.inputs(torch.float32, "cpu")[:3])
            run = providers.PROVIDERS["flex"](shape, torch.float32, stand_in)
            torch.testing.assert_close(run(q, k, v), naive(q, k, v, is_causal=False))
        with pytest.raises(Exception, match="fullgraph=True"):
            run(*(x[:, :, :40] for x in (q, k, v)))


def test_command_writes_results_and_a_plot(tiny, tmp_path, capsys):
    assert cli.main(["bench", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    loaded = json.loads((tmp_path / "results.json").read_text())
    assert loaded["machine"]["torch"] == torch.__version__
    assert (tmp_path / "results.png").stat().st_size > 1000
    plots.draw(tmp_path / "results.json", tmp_path / "again.png")
    assert (tmp_path / "again.png").exists()


def test_flops_and_bytes():
    full = Shape("full", 2, 3, 10, 8)
    assert full.flops("forward") == 4 * 2 * 3 * 10 * 10 * 8
    assert full.flops("forward+backward") == full.flops("forward") + full.flops("backward") == 3.5 * full.flops("forward")
    assert Shape("half", 2, 3, 10, 8, is_causal=True).flops("forward") == full.flops("forward") / 2
    assert full.bytes("forward", itemsize=2) == 4 * 2 * 3 * 10 * 8 * 2
    assert full.exps("forward+backward") == 2 * full.exps("forward") == 2 * 2 * 3 * 10 * 10


def test_inputs_are_views_of_a_packed_projection():
    q, k, v, do = TINY.inputs(torch.float32, "cpu")
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.shape == k.shape == v.shape == do.shape == (2, 3, 40, 16)


def test_flash_attn_packages_get_their_layout(monkeypatch):
    """(B, N, H, D) and `causal`, and of (out, lse) the first; on a stand-in for a package and a GPU."""

    def flash_attn_func(q, k, v, causal):
        out = tfkern.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, backend="eager")
        return out.transpose(1, 2), None

    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v = torch.randn(3, 2, 3, 40, 16)
    run = providers.PROVIDERS["flash-attn 3"](TINY, torch.float32, types.SimpleNamespace(type="cuda"))
    torch.testing.assert_close(run(q, k, v), tfkern.attention(q, k, v, is_causal=True))
    with pytest.raises(providers.UnavailableError, match="does not import"):
        providers.PROVIDERS["flash-attn 4"](TINY, torch.float32, types.SimpleNamespace(type="cuda"))


class Chip:
    """Streams and graphs of CUDA: what runs on a stream while it is captured is in the graph, and nothing else is."""

    def __init__(self, monkeypatch):
        self.current, self.capturing, self.log = "default", None, []
        monkeypatch.setattr(torch.cuda, "Stream", lambda: types.SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(held=[], replay=None))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, stream):
        graph.replay = lambda: [one() for one in graph.held]
        self.capturing = graph, stream
        with self.stream(stream):
            yield
        self.capturing = None

    def run(self, name, stream, work):
        """`work` on a stream; a graph that holds it writes what it makes to the same place again."""
        result = work()
        self.log.append((name, "default" if stream == "default" else "side", self.capturing is not None))
        if self.capturing and self.capturing[1] is stream:
            self.capturing[0].held.append(lambda: result.copy_(work()))
        return result

    def attention(self, q, k, v):
        """Stands for it; autograd runs the backward on the stream of the forward."""

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v):
                ctx.stream = self.current
                ctx.save_for_backward(q, k, v)
                return self.run("forward", ctx.stream, lambda: q * k * v)

            @staticmethod
            def backward(ctx, do):
                q, k, v = ctx.saved_tensors
                parts = (k * v, q * v, q * k)
                return tuple(self.run("backward", ctx.stream, lambda part=part: do * part) for part in parts)

        return Function.apply(q, k, v)


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_graphs_hold_what_is_timed(monkeypatch, direction):
    chip = Chip(monkeypatch)
    with timing.stream(graphs=True):
        call = runner.calls(chip.attention, *TINY.inputs(torch.float32, "cpu"))[direction]
        expected = {name: x.clone() for name, x in call().items()}
        chip.log.clear()
        found = timing.again(timing.replayed(call))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {stream for _, stream, _ in chip.log} == {"side"}
    captured = [captured for _, _, captured in chip.log]
    assert captured == sorted(captured)  # first the warm-up, then what is captured
    assert captured.count(False) == timing.WARM_UP * captured.count(True)
    assert chip.current == "default"


def test_a_graph_that_holds_nothing_is_noticed(monkeypatch):
    """The forward ran elsewhere, so its backward does too, captured or not."""
    chip = Chip(monkeypatch)
    call = runner.calls(chip.attention, *TINY.inputs(torch.float32, "cpu"))["backward"]
    with timing.stream(graphs=True):
        found = timing.again(timing.replayed(call))
    assert all(x.isnan().all() for x in found.values())


def test_without_a_gpu_there_are_no_graphs():
    (row,) = runner.figures("naive", TINY, torch.float32, torch.device("cpu"), 0.01, graphs=True)
    assert row["skipped"] == "there are no CUDA graphs without a GPU"


def test_repeats(monkeypatch, device):
    """What gives other bits once is a problem; NaN are equal to themselves."""
    results = iter([dict(out=torch.full((2,), torch.nan))] * 4 + [dict(out=torch.tensor([torch.nan, 0.0]))])
    (row,) = repeats.rows(lambda: lambda: next(results), times=3)
    assert row["repeats"] == 3
    results = iter([dict(out=torch.zeros(2))] * 3 + [dict(out=torch.tensor([0.0, -0.0]))])
    (row,) = repeats.rows(lambda: lambda: next(results), times=3)
    assert row["problem"] == "out differ in repeat 3"
    named = dict(repeats.cases([TINY], [testing.CASES[0]], torch.float32, torch.device(device), times=1))
    assert list(named) == ["tiny hopper", "tiny portable", f"{testing.CASES[0].name} portable"]
    (row,) = named["tiny hopper"]()
    assert "float32" in row["skipped"]
    (row,) = named["tiny portable"]()
    assert row["repeats"] == 1
    assert row["kernels"][0] == "flash_fwd 64x32 w4 s2"
