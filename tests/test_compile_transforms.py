"""What else compiles, exports and transforms: torch.export, opcheck, torch.func, and what must raise, eager and compiled."""

import io

import pytest
import torch
from torch.autograd import forward_ad

import tfkern
from tfkern import call, ops
from tfkern.testing.cases import CASES, FEATURE_CASES
from tfkern.testing.inputs import make_inputs


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def compiled(f):
    return torch.compile(f, fullgraph=True, backend="aot_eager")


CHECKED = {
    "causal", "layout-bnhd", "layout-expanded", "padded-lower-right", "gqa-everything", "bool-mask-padding", "bias-of-heads", "dropout",
    "packed-gqa", "packed-slopes", "sinks", "slopes-of-batches", "scale-as-tensor", "everything",
    "precise-delta-packed",
}  # fmt: skip


looked_at = pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo and AOTAutograd look at what is no leaf


@looked_at
@pytest.mark.parametrize("case", [c for c in CASES + FEATURE_CASES if c.name in CHECKED], ids=str)
def test_opcheck(case, device):
    inputs = make_inputs(case, torch.float32, device)
    clean = {name: x.requires_grad_() for name, x in inputs.clean.items()}
    tensors, options = ops.op_arguments(*call.given(**clean, **inputs.options, enable_gqa=True))
    tensors = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in tensors]
    torch.library.opcheck(torch.ops.tfkern.attention.default, (*tensors, *options))


@looked_at
def test_opcheck_one_tensor():
    qkv = torch.randn(2, 10, 3, 2, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    tensors, options = ops.op_arguments(*call.given(q, k, v, is_causal=True), qkv=qkv.requires_grad_())
    torch.library.opcheck(torch.ops.tfkern.attention.default, (*tensors, *options))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = tfkern.nn.SelfAttention(24, 3, is_causal=True, dropout=0.1)
        self.second = tfkern.nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x):
        y = self.first(x)
        return self.second(y, y, y, need_weights=False)[0]


def trained(model, x) -> list:
    """The output and the gradient of each parameter, with the same random bits every time."""
    torch.manual_seed(0)
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


# PyTorch about itself, the second 2.11
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning", "ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export(strict, training):
    """One op a call, any length, saved and loaded, decomposed, and trained."""
    torch.manual_seed(0)
    model = Model().train(training)
    shapes = ({1: torch.export.Dim("n", min=2, max=1000)},)
    program = torch.export.export(model, (torch.randn(2, 10, 24),), strict=strict, dynamic_shapes=shapes)
    assert sum(node.target is torch.ops.tfkern.attention.default for node in program.graph.nodes) == 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(2, 17, 24)
    wanted = trained(model, x)
    for one in (program, torch.export.load(file), program.run_decompositions()):
        for found, want in zip(trained(one.module(), x), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=0)


def attend(q, k, v):
    return tfkern.attention(q, k, v, is_causal=True)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 9, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def loss(*qkv):
    return attend(*qkv).square().sum()


@looked_at
@pytest.mark.parametrize("how", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_torch_func(qkv, how):
    """grad, vjp, jacrev, vmap and vmap of grad."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    close = torch.testing.assert_close
    close(how(torch.func.grad(loss, (0, 1, 2)))(*qkv), grads)
    close(
        how(lambda *t: torch.func.vjp(attend, *t)[1](t[0]))(*qkv), torch.autograd.grad(out, leaves, qkv[0], retain_graph=True)
    )
    jacobian = how(torch.func.jacrev(attend))(*qkv)
    close(jacobian[1, 2, 3, 1], torch.autograd.grad(out[1, 2, 3, 1], leaves[0])[0])
    stacked = [torch.stack((x, 2 * x), 1) for x in qkv]
    double = [2 * x for x in qkv]
    found = how(torch.vmap(attend, (1, 1, None)))(*stacked[:2], qkv[2])
    close(found, torch.stack((attend(*qkv), attend(*double[:2], qkv[2]))))
    found = how(torch.vmap(torch.func.grad(loss), 1))(*stacked)
    close(found, torch.stack((grads[0], torch.func.grad(loss)(*double))))


def test_vmap_of_every_argument():
    """Mapped sinks, slopes, biases and packed sequences, each with its gradient; dropout's bits differ or not, as randomness says."""
    generator = torch.Generator().manual_seed(0)
    q, bias, slopes, sinks = (torch.randn(shape, generator=generator) for shape in ((3, 7, 2, 8), (3, 2, 1, 4), (3, 2), (3, 2)))

    def f(q, bias, slopes, sinks):
        cu = torch.tensor([0, 3, 7])
        return tfkern.attention_varlen(q, q, q, cu, cu, bias[:, :, :4], alibi_slopes=slopes, sinks=sinks).square().sum()

    found = torch.vmap(torch.func.grad(f, (0, 1, 2, 3)))(q, bias, slopes, sinks)
    for n in range(3):
        wanted = torch.func.grad(f, (0, 1, 2, 3))(q[n], bias[n], slopes[n], sinks[n])
        torch.testing.assert_close([x[n] for x in found], list(wanted))
    x = torch.randn(2, 4, 9, 8).expand(2, 2, 4, 9, 8)

    def drop(x):
        return tfkern.attention(x, x, x, dropout_p=0.5)

    same = torch.vmap(drop, randomness="same")(x)
    assert torch.equal(*same.unbind(0))
    different = torch.vmap(drop, randomness="different")(x)
    assert not torch.equal(*different.unbind(0))


def forward_mode(q, k, v, f=attend):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, q), k, v)).tangent


def second(q, k, v):
    return torch.func.grad(lambda x: torch.func.grad(loss)(x, k, v).sum())(q)


NOT_BUILT = {
    "jvp": (lambda q, k, v: torch.func.jvp(attend, (q, k, v), (q, k, v))[1], "jvp"),
    "dual": (forward_mode, "jvp"),
    "second": (second, "second derivatives"),
    "forward-over-reverse": (lambda q, k, v: torch.func.jvp(lambda x: torch.func.grad(loss)(x, k, v), (q,), (q,))[1], "jvp"),
    "hessian": (torch.func.hessian(loss), "jvp"),
}


@looked_at
@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_not_built_raises(qkv, name):
    """Never a wrong derivative: NotImplementedError, while compiling wrapped into Dynamo's own, with our message."""
    f, message = NOT_BUILT[name]
    with pytest.raises(NotImplementedError, match=message):
        f(*qkv)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{message}.* not built yet"):
        compiled(f)(*qkv)


@looked_at
def test_derivatives_of_what_is_compiled_raise(qkv):
    refusals = NotImplementedError, torch._dynamo.exc.Unsupported  # from PyTorch 2.14 on Dynamo refuses, before it comes to us
    with pytest.raises(refusals, match=r"jvp|forward-mode AD tangent"):
        forward_mode(*qkv, compiled(attend))
    x = qkv[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(loss)(x, *qkv[1:]), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):  # PyTorch's
        torch.autograd.grad(grad.sum(), x)
    message = r"second derivatives|anomaly metadata"  # PyTorch 2.11 fails on its way there
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        compiled(lambda x: torch.func.grad(loss)(x, *qkv[1:]))(x)
