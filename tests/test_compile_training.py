"""What training puts around a layer: checkpointing, autocast, GradScaler, DDP, FSDP2, CUDA graphs; eager and compiled."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from functorch.compile import aot_function, default_partition, min_cut_rematerialization_partition, nop
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import tfkern


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def compiled(f):
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return tfkern.nn.SelfAttention(16, 2, is_causal=True, dropout=0.5)


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))


def trained(f, layer, x=X) -> list:
    torch.manual_seed(3)
    out = f(x.clone().requires_grad_())
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), list(layer.parameters()))]


def same(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(layer, use_reentrant):
    """Replayed, dropout has the pattern that it had."""

    def f(x):
        out = checkpoint(layer, x, use_reentrant=use_reentrant)
        torch.rand(7)  # what comes between forward and backward draws too
        return out

    def backward(f):
        layer.zero_grad()
        torch.manual_seed(3)
        out = f(X.clone().requires_grad_())
        out.square().sum().backward()  # which the reentrant form asks for
        return [out.detach(), *(p.grad.clone() for p in layer.parameters())]

    same(backward(f), backward(layer))


def test_checkpoint_compiled(layer):
    f = compiled(lambda x: checkpoint(layer, x, use_reentrant=False))
    same(trained(f, layer), trained(layer, layer))


Q, K, V, W = torch.randn(4, 2, 3, 12, 8, generator=torch.Generator().manual_seed(2)).double()


def linear_in_v(f) -> None:
    """The result of f is linear in v, so its product with w is that of v and the gradient, if that has the forward's bits."""
    torch.manual_seed(3)
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    y = f(q, k, v)
    torch.rand(7)
    _, _, dv = torch.autograd.grad((y * W).sum(), (q, k, v))
    torch.testing.assert_close((v * dv).sum(), (y * W).sum())


def dropped(q, k, v):
    """Twice the same, with dropout: each has bits of its own."""
    q, k, v = q.sin(), k.cos(), 2 * v
    return tfkern.attention(q, k, v, dropout_p=0.5) - 3 * tfkern.attention(q, k, v, dropout_p=0.5)


def checkpointed(q, k, v):
    return checkpoint(dropped, q, k, v, use_reentrant=False)


def vmapped(q, k, v):
    return torch.vmap(lambda *x: dropped(*(t[None] for t in x))[0], randomness="different")(q, k, v)


class Dropped(torch.nn.Module):
    forward = staticmethod(dropped)


@pytest.fixture
def budget(request):
    """The part of the activations that may be saved. (A cached graph would be an older one of the same ops.)"""
    with functorch_config.patch(activation_memory_budget=request.param, enable_autograd_cache=False):
        yield


BUDGETS = pytest.mark.parametrize("budget", [0.0, 0.2, pytest.param(1.0, marks=pytest.mark.slow)], indirect=True)
PARTITIONING = "aot_eager_decomp_partition"  # eager, but with inductor's partitioner


@BUDGETS
@pytest.mark.parametrize("f", [dropped, checkpointed])
@pytest.mark.parametrize(
    "backend", [PARTITIONING, *(pytest.param(x, marks=pytest.mark.slow) for x in ("aot_eager", "cudagraphs", "inductor"))]
)
def test_partitioners_keep_the_bits(backend, budget, f):
    """Dropout's, whatever is recomputed."""
    linear_in_v(torch.compile(f, fullgraph=True, backend=backend))


@BUDGETS
@pytest.mark.slow
def test_partitioners_keep_the_bits_of_other_graphs(budget):
    def whole(f, **options):
        torch._dynamo.reset()
        return torch.compile(f, fullgraph=True, backend=PARTITIONING, **options)

    def tangent(q, k, v):  # forward and backward in a graph without a backward of its own
        y, back = torch.func.vjp(lambda v: tfkern.attention(q, k, v, dropout_p=0.5), v)
        return (y * W).sum() - (v * back(W)[0]).sum()

    exported = torch.export.export(Dropped(), (Q, K, V)).module()
    for f in (exported, vmapped):
        linear_in_v(whole(f))
    linear_in_v(whole(dropped, dynamic=True))
    for partition in (default_partition, min_cut_rematerialization_partition):
        linear_in_v(aot_function(exported, nop, nop, partition_fn=partition))
    torch.testing.assert_close(whole(tangent)(Q, K, V), torch.zeros(()).double())
    with torch.no_grad():
        torch.manual_seed(0)
        found = whole(dropped)(Q, K, V)
        torch.manual_seed(0)
        assert torch.equal(found, dropped(Q, K, V))


@pytest.mark.parametrize("how", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_autocast_and_grad_scaler(layer, how):
    """A scaled loss gives the same step; autocast may be inside what is compiled or around it."""

    def inside(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    wanted = trained(inside, layer)
    assert wanted[0].dtype == torch.bfloat16
    same(trained(how(inside), layer), wanted)
    around = how(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(3)
        assert torch.equal(around(X), wanted[0])
    found = []
    for scale in (1.0, 2.0**10):
        model = copy.deepcopy(layer)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(3)
        scaler.scale(how(model)(X).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append([p.detach() for p in model.parameters()])
    same(*found)
    assert not torch.equal(found[0][0], layer.qkv.weight)


def test_deepcopy_and_pickle(layer):
    mha = tfkern.nn.MultiheadAttention(16, 2)
    for module in (layer, mha, tfkern.nn.TransformerEncoderLayer(16, 2, 32)):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            same(other.state_dict().values(), module.state_dict().values())
    twin = copy.deepcopy(layer)
    same(trained(twin, twin), trained(layer, layer))


def test_inference_mode(layer):
    layer.eval()
    with torch.inference_mode():
        out = layer(X)
        assert out.is_inference()
        assert torch.equal(compiled(layer)(X), out)
    assert torch.equal(out, layer(X))


PROGRAM = """
import copy, sys, torch, torch.distributed as dist
from torch import nn
from tfkern.nn import SelfAttention

kind, rank, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(SelfAttention(16, 2, is_causal=True), SelfAttention(16, 2))
whole = copy.deepcopy(model)
x = torch.randn(2, 9, 16)
if kind == "ddp":
    model = nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
for m, mine in ((model, x[rank : rank + 1]), (whole, x)):
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    for _ in range(2):
        m(mine).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
for p, q in zip(model.parameters(), whole.parameters()):
    p = p.full_tensor() if hasattr(p, "full_tensor") else p
    torch.testing.assert_close(p, q)
dist.destroy_process_group()
print("same")
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_two_processes(kind, tmp_path):
    """Two steps with half of the batch each are two steps with all of it."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-I", "-W", "ignore", "-c", PROGRAM, kind]
    said = [tmp_path / f"said-{rank}" for rank in range(2)]
    both = []
    try:
        for rank in range(2):
            with open(said[rank], "w") as file:
                arguments = [*command, str(rank), str(tmp_path / "meet")]
                both.append(subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT))
        for process in both:
            process.wait(timeout=180)
    finally:
        for process in both:
            process.kill()
            process.wait()
    for file in said:
        assert file.read_text().endswith("same\n"), file.read_text()


@pytest.mark.gpu
def test_cuda_graph():
    """A replay draws new dropout, and takes what stands in the inputs then."""
    q = torch.randn(2, 2, 64, 32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            tfkern.attention(q, q, q, dropout_p=0.5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain, dropped = tfkern.attention(q, q, q), tfkern.attention(q, q, q, dropout_p=0.5)
    graph.replay()
    first = dropped.clone()
    graph.replay()
    assert not torch.equal(first, dropped)
    q.normal_()
    graph.replay()
    torch.testing.assert_close(plain, tfkern.attention(q, q, q))
