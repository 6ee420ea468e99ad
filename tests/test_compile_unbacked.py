"""Sizes that data decide on, as after x[mask]: torch.export and torch.compile(fullgraph=True) know nothing of them but a name."""

import pytest
import torch

import tfkern
from tfkern.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(12, 3, 2, 8, generator=GENERATOR)  # of packed sequences
BATCH = torch.randn(12, 2, 6, 8, generator=GENERATOR)
CU = torch.tensor([0, 3, 7])
sdpa = tfkern.scaled_dot_product_attention
torch.manual_seed(0)
SELF = tfkern.nn.SelfAttention(8, 2, is_causal=True)
MHA = tfkern.nn.MultiheadAttention(8, 2, batch_first=True)


def padded(y):
    return MHA(y, y, y, torch.arange(6).expand(y.shape[0], 6) > 3, need_weights=False)[0]


def other():
    return torch.linspace(0, 1, 96).view(1, 2, 6, 8)


def as_length(y):
    return y[:, 0].transpose(0, 1)[None]


# Of x[mask], and what x is.
FUNCTIONS = {
    "varlen": (lambda y: tfkern.attention_varlen(*y.unbind(1), CU, CU, is_causal=True), ROWS),
    "packed-varlen": (lambda y: tfkern.attention_packed(y, cu_seqlens=CU), ROWS),
    "flash-varlen": (lambda y: flash_attn_varlen_func(*y.unbind(1), CU, CU, 4, 4, causal=True), ROWS),
    "flash-varlen-packed": (lambda y: flash_attn_varlen_qkvpacked_func(y, CU, 4, window_size=(2, 0)), ROWS),
    "batch": (lambda y: tfkern.attention(y, y, y, y.new_zeros(y.shape[0], 1, 6, 6), window=(3, 3)), BATCH),
    "batch-features": (
        lambda y: tfkern.attention(
            y, y, y, y.new_zeros(2, 6, 6), key_lengths=torch.full((y.shape[0],), 3), alibi_slopes=y.new_ones(y.shape[0], 2)
        ),
        BATCH,
    ),
    "batch-packed": (lambda y: tfkern.attention_packed(torch.stack((y, y, y), 3).transpose(1, 2).transpose(2, 3)), BATCH),
    "batch-flash": (lambda y: flash_attn_func(y, y, y, causal=True), BATCH),
    "length": (lambda y: tfkern.attention(*(as_length(y),) * 3, is_causal=True), ROWS),
    "length-of-keys": (lambda y: tfkern.attention(other(), as_length(y), as_length(y), window=(2, 2)), ROWS),
    "sdpa": (lambda y: sdpa(y, y, y, y.new_zeros(y.shape[0], 1, 1, 6)), BATCH),
    "sdpa-3d": (lambda y: sdpa(y[:, 0], y[:, 0], y[:, 0], is_causal=True), BATCH),
    "sdpa-5d": (lambda y: sdpa(y[:, None], y[:, None, :1], y[:, None, :1], enable_gqa=True), BATCH),
    "sdpa-broadcast": (lambda y: sdpa(y, other(), other()), BATCH),
    "sdpa-length": (lambda y: sdpa(*(as_length(y),) * 3, is_causal=True), ROWS),
    "self-attention": (lambda y: SELF(y[:, 0]), BATCH),
    "mha": (lambda y: MHA(y[:, 0], y[:, 0], y[:, 0], need_weights=False)[0], BATCH),
    "mha-padding": (lambda y: padded(y[:, 0]), BATCH),
}
FAST = {(name, "export") for name in ("varlen", "batch-features", "length", "sdpa", "mha-padding")} | {("varlen", "compile")}
EACH = [(name, how, dynamic) for name in FUNCTIONS for how in ("export", "strict", "compile") for dynamic in (True, False)]


class Model(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
        self.layers = torch.nn.ModuleList([SELF, MHA])  # torch.export wants to find the parameters

    def forward(self, x, mask):
        return self.f(x[mask])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")  # PyTorch about itself
@pytest.mark.parametrize(
    ("name", "how", "dynamic"),
    [pytest.param(*each, marks=[] if each[2] and each[:2] in FAST else pytest.mark.slow) for each in EACH],
)
def test_sizes_that_data_decide_on(name, how, dynamic):
    f, x = FUNCTIONS[name]
    model, mask = Model(f), torch.arange(12) % 3 > 0
    masks = [mask] if "varlen" in name else [mask, torch.arange(12) == 2, torch.arange(12) > 4]
    if how == "compile":
        found = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic or None)
    else:
        auto = torch.export.Dim.AUTO
        shapes = ({0: auto}, {0: auto}) if dynamic else None
        found = torch.export.export(model, (x, mask), strict=how == "strict", dynamic_shapes=shapes)
        found = found.run_decompositions().module()
    for m in masks:
        results = []
        for g in (found, model):
            leaf = x.clone().requires_grad_()
            out = g(leaf, m)
            results.append((out, torch.autograd.grad(out.square().sum(), leaf)[0]))
        torch.testing.assert_close(*results)


def test_what_does_not_fit_raises_when_it_runs():
    """Two sizes that only data tell apart."""

    def f(x, mask, other):
        y, z = x[mask], x[other]
        return tfkern.attention(y, z, z)

    mask = torch.arange(12) % 3 > 0
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(BATCH, mask, mask), f(BATCH, mask, mask))
    with pytest.raises(ValueError, match="key must have the batch size of query, 8, but has"):
        compiled(BATCH, mask, ~mask)
