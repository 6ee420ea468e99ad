"""DTensors and other classes of tensors: right, or an error at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_upper_left

import tfkern

DISTRIBUTED = torch.distributed.is_available()
pytestmark = pytest.mark.needs("torch.distributed", DISTRIBUTED)
if DISTRIBUTED:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import local_map
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.testing._internal.two_tensor import TwoTensor


@pytest.fixture(params=[0, 1], ids=["rank 0", "rank 1"])
def mesh(request):
    """One of two ranks, in a group that communicates nothing: whoever tries gets garbage."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def patched():
    with tfkern.patched():
        yield


def place(x, mesh, placement):
    return distribute_tensor(x, mesh, [placement], src_data_rank=None)


def part(x, mesh, dim):
    """Of a whole tensor what the rank has; dim None is all of it."""
    return x if dim is None or x.shape[dim] == 1 else x.chunk(2, dim)[mesh.get_local_rank()]


B, H, L, S, E = 2, 4, 5, 7, 8
CASES = {  # dim that is sharded, shapes, options, mask
    "batch": (0, [(B, H, L, E), (B, H, S, E), (B, H, S, E)], {}, None),
    "heads": (1, [(B, H, L, E), (B, H, S, E), (B, H, S, 12)], dict(is_causal=True, scale=0.2), None),
    "uneven heads": (1, [(B, 3, L, E)] * 3, {}, None),
    "grouped heads": (1, [(B, 4, L, E), (B, 2, S, E), (B, 2, S, E)], dict(enable_gqa=True), None),
    "three dims": (0, [(4, L, E), (4, S, E), (4, S, E)], {}, None),
    "replicated": (None, [(B, H, L, E)] * 3, {}, (L, L)),
    "batch, a mask for all": (0, [(B, H, L, E), (B, H, S, E), (B, H, S, E)], {}, (L, S)),
    "heads, a mask of each": (1, [(B, H, L, E), (B, H, S, E), (B, H, S, E)], {}, (1, H, L, S)),
    "heads, a mask of each batch": (1, [(B, H, L, E), (B, H, S, E), (B, H, S, E)], {}, (B, 1, L, S)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_rank_has_its_part(mesh, patched, name):
    """Outputs and gradients, a mask's too, whose sum over the ranks is the whole's."""
    dim, shapes, options, mask_shape = CASES[name]
    torch.manual_seed(0)
    whole = [torch.randn(shape).requires_grad_() for shape in shapes]
    given = [place(x.detach(), mesh, Replicate() if dim is None else Shard(dim)).requires_grad_() for x in whole]
    at = None
    if mask_shape:
        whole.append(torch.randn(mask_shape).requires_grad_())
        at = None if dim is None or len(mask_shape) < 4 or mask_shape[dim] == 1 else dim
        given.append(place(whole[-1].detach(), mesh, Replicate() if at is None else Shard(at)).requires_grad_())
    out, want = F.scaled_dot_product_attention(*given, **options), F.scaled_dot_product_attention(*whole, **options)
    assert (type(out), out.placements, out.shape, out.stride()) == (DTensor, given[0].placements, want.shape, want.stride())
    torch.testing.assert_close(out.to_local(), part(want, mesh, dim))
    do = torch.randn(want.shape)
    out.to_local().backward(part(do, mesh, dim))
    if mask_shape and at is None and dim is not None:  # each rank's gradient is of its own scores
        assert given[-1].grad.placements[0].is_partial()
        zeros = do.chunk(2, dim)
        do = torch.cat([x if n == mesh.get_local_rank() else 0 * x for n, x in enumerate(zeros)], dim)
    want.backward(do)
    for x, w, d in zip(given, whole, (dim, dim, dim, at), strict=False):
        if name == "uneven heads" and x.grad.placements[0].is_replicate():
            continue  # PyTorch 2.11 gathers gradients of uneven parts, which nobody can in this group
        torch.testing.assert_close(x.grad.to_local(), part(w.grad, mesh, d))


REFUSED = {
    "lengths": (lambda place, x: [place(x, Shard(2))] * 3, "sharded along batch or heads, but are placed as"),
    "head dims": (lambda place, x: [place(x, Shard(3))] * 3, "sharded along batch or heads, but are placed as"),
    "two placements": (lambda place, x: [place(x, Shard(0)), *[place(x, Replicate())] * 2], "key must have the dims, mesh and"),
    "one is none": (lambda place, x: [place(x, Shard(0)), x, x], "key must be a DTensor, as another one is, but is Tensor"),
    "two are": (lambda place, x: [x, *[place(x, Shard(0))] * 2], "query must be a DTensor, as another one is, but is Tensor"),
    "a mask that is none": (lambda place, x: [place(x, Shard(0))] * 3 + [torch.zeros(4, 4)], "attn_mask must be a DTensor"),
    "a mask alone": (lambda place, x: [x] * 3 + [place(torch.zeros(4, 4), Replicate())], "query must be a DTensor"),
    "a mask cut elsewhere": (
        lambda place, x: [place(x, Shard(0))] * 3 + [place(torch.zeros(4, 4), Shard(0))],
        r"attn_mask must be replicated where query is S\(0\), but is S\(0\)",
    ),
    "a mask not cut": (
        lambda place, x: [place(x, Shard(1))] * 3 + [place(torch.zeros(2, 4, 4), Replicate())],
        r"attn_mask must be sharded along dim 0 where query is S\(1\), but is R",
    ),
    "broadcast": (
        lambda place, x: [place(x, Shard(1)), *[place(x[:, :1], Shard(1))] * 2],
        "must be cut alike along dim 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("mesh", [0], indirect=True)
def test_an_error_at_once(mesh, patched, name):
    """Where PyTorch's operator searches for minutes, or tells that it got mixed tensors."""
    make, message = REFUSED[name]
    given = make(lambda x, placement: place(x, mesh, placement), torch.randn(2, 2, 4, 8))
    with pytest.raises(NotImplementedError, match=message):
        F.scaled_dot_product_attention(*given)


@pytest.mark.parametrize("mesh", [1], indirect=True)
def test_around_it(mesh, patched):
    """CausalBias, compiled, a layer of PyTorch's; tfkern.attention says what to do, and that works."""
    q = torch.randn(2, 4, 6, 8)
    d, want = place(q, mesh, Shard(1)), F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 2:]
    torch.testing.assert_close(F.scaled_dot_product_attention(d, d, d, causal_upper_left(6, 6)).to_local(), want)
    compiled = torch.compile(
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(d).to_local(), want)
    for function in (
        lambda: tfkern.attention(d, d, d),
        lambda: tfkern.attention(q, q, q, alibi_slopes=place(torch.ones(4), mesh, Replicate())),
        lambda: tfkern.attention_packed(place(torch.ones(2, 6, 3, 4, 8), mesh, Shard(3))),
    ):
        with pytest.raises(NotImplementedError, match=r"takes no DTensor\. Call tfkern\.scaled_dot_product_attention"):
            function()
    mapped = local_map(
        lambda x: tfkern.attention(x, x, x, is_causal=True),
        [Shard(1)],
        ([Shard(1)],),
        device_mesh=mesh,
        redistribute_inputs=True,
    )
    torch.testing.assert_close(mapped(d).to_local(), want)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    want = layer(x, x, x, need_weights=False)[0]
    tfkern.patch(layer)
    for name, p in list(layer.named_parameters()):
        owner = layer.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(place(p.detach(), mesh, Replicate())))
    x = place(x, mesh, Replicate())
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0].to_local(), want)


class Plain(torch.Tensor):
    """No meaning of its own."""


SEEN = []


class Asked(torch.Tensor):
    """Asked about every function."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        SEEN.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_other_classes_of_tensors(patched):
    q = torch.randn(1, 2, 5, 8)
    want = F.scaled_dot_product_attention(q, q, q)
    for cls in (Plain, Asked):
        out = F.scaled_dot_product_attention(q.as_subclass(cls), q, q)
        assert type(out) is cls
        torch.testing.assert_close(out.as_subclass(torch.Tensor), want)
    assert torch._C._nn.scaled_dot_product_attention in SEEN
    two = TwoTensor(q, 2 * q)
    out = F.scaled_dot_product_attention(two, two, two)
    torch.testing.assert_close(out.a, want)
    torch.testing.assert_close(out.b, F.scaled_dot_product_attention(2 * q, 2 * q, 2 * q))
    with pytest.raises(NotImplementedError, match="takes no TwoTensor"):
        tfkern.attention(two, two, two)
    with torch.device("cpu"):  # a mode that looks at every function
        assert type(F.scaled_dot_product_attention(q, q, q)) is torch.Tensor
