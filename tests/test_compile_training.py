"""What training puts around a layer: checkpointing, autocast, GradScaler, DDP, FSDP2, CUDA graphs; eager and compiled."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
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
