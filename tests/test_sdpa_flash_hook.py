"""tfkern as the flash attention of PyTorch itself: the ops that its hook replaces on CUDA devices, put into the CPU's place."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import attention as hook
from torch.nn.attention.varlen import AuxRequest, varlen_attn

import tfkern
from tfkern import reference
from tfkern.integrations import torch_flash
from tfkern.testing import budget

aten = torch.ops.aten
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture
def on_cpu():
    """The ops for CPU tensors, where PyTorch has none."""
    library = torch_flash.implement("CPU")
    yield
    del library


def draw(*shapes, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def run(function, leaves, do):
    """out, lse and gradients of out."""
    out, lse = function(*leaves)
    grads = torch.autograd.grad(out, leaves, do.to(out.dtype))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def assert_within_budget(ours, oracle, leaves):
    """By the rule of tfkern.testing.budget; `oracle` takes the form in which plain PyTorch is written."""
    do = torch.randn(ours(*leaves)[0].shape, generator=torch.Generator().manual_seed(4))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    singles = [x.detach().float().requires_grad_() for x in leaves]
    naive = functools.partial(oracle, reference.attention)
    flash = functools.partial(oracle, functools.partial(reference.flash, out_dtype=leaves[0].dtype))
    found, truth = run(ours, leaves, do), run(naive, doubles, do)
    plains = [run(naive, leaves, do), run(flash, singles, do)]
    for error in budget.judge(found, truth, plains, lambda: run(flash, doubles, do)):
        assert error.ok, str(error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=("full", "causal"))
@pytest.mark.parametrize("shape", [(2, 4, 2, 37, 24), (1, 3, 3, 1, 8), (1, 2, 1, 130, 40)], ids=str)
def test_sdpa_flash_op(on_cpu, dtype, is_causal, shape):
    batch, heads, kv_heads, length, dim = shape
    leaves = draw((batch, heads, length, dim), *[(batch, kv_heads, length, dim)] * 2, dtype=dtype)

    def ours(q, k, v):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=0.3)[:2]

    def oracle(form, q, k, v):
        return form(q, k, v, is_causal=is_causal, scale=0.3, enable_gqa=True, return_lse=True)

    assert_within_budget(ours, oracle, leaves)


@pytest.mark.parametrize("window", [(None, None), (7, 3), (0, -1), (-2, 5)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=("full", "causal"))
@pytest.mark.parametrize("lengths", [(20, 33), (33, 20)], ids=str)
def test_sdpa_flash_op_of_other_lengths_stands_at_the_lower_right(on_cpu, window, is_causal, lengths):
    leaves = draw((2, lengths[0], 4, 16), *[(2, lengths[1], 2, 16)] * 2)
    sides = tuple(None if side is None or side < 0 else side for side in window)

    def ours(q, k, v):
        more = dict(window_size_left=window[0], window_size_right=window[1])
        return aten._flash_attention_forward(q, k, v, None, None, *lengths, 0.0, is_causal, False, **more)[:2]

    def oracle(form, *qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv)
        out, lse = form(
            q, k, v, is_causal=is_causal, window=sides, causal_alignment="lower_right", enable_gqa=True, return_lse=True
        )
        return out.transpose(1, 2), lse

    assert_within_budget(ours, oracle, leaves)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 2)], ids=str)
def test_sdpa_flash_varlen(on_cpu, window):
    """PyTorch's varlen_attn: sequences of different lengths, one of them empty."""
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 9, 9, 30], [0, 4, 11, 36]))
    leaves = draw((30, 4, 16), (36, 2, 16), (36, 2, 16))
    left, right = (None if side == -1 else side for side in window)

    def ours(q, k, v):
        given = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in PyTorch 2.11
        more = dict(enable_gqa=True) if given else {}
        return varlen_attn(q, k, v, cu_q, cu_k, 21, 25, window_size=window, return_aux=AuxRequest(lse=True), **more)

    def oracle(form, q, k, v):
        more = dict(window=(left, right), causal_alignment="lower_right", enable_gqa=True, return_lse=True)
        return reference.attention_varlen(q, k, v, cu_q, cu_k, naive=form, **more)

    assert_within_budget(ours, oracle, leaves)


def test_sdpa_flash_dropout_is_that_of_tfkern(on_cpu):
    """The same seed gives the same bits, forward and backward."""
    leaves = draw(*[(2, 3, 40, 16)] * 3)
    do = torch.randn(2, 3, 40, 16)
    torch.manual_seed(5)
    found = run(lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.3, True)[:2], leaves, do)
    torch.manual_seed(5)
    wanted = run(lambda q, k, v: tfkern.attention(q, k, v, None, 0.3, True, return_lse=True), leaves, do)
    for name, x in found.items():
        assert torch.equal(x, wanted[name]), name


def test_sdpa_flash_inference(on_cpu):
    """What PyTorch's backward knows nothing of: lengths of keys and ALiBi; and the op that writes into a tensor."""
    q, k, v = (x.detach() for x in draw(*[(2, 12, 4, 16)] * 3))
    lengths, slopes = torch.tensor([5, 12], dtype=torch.int32), torch.tensor([0.1, 0.2, 0.3, 0.4])
    more = dict(seqused_k=lengths, alibi_slopes=slopes)
    given = (q, k, v, None, None, 12, 12, 0.0, False, False)
    out, lse, *_ = aten._flash_attention_forward(*given, **more)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    wanted, wanted_lse = tfkern.attention(
        *heads_first, key_lengths=lengths, alibi_slopes=slopes, causal_alignment="lower_right", return_lse=True
    )
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=0, atol=0)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=0)
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        into = torch.full_like(q, torch.nan)
        assert torch.equal(aten._flash_attention_forward_no_dropout_inplace(into, *given, **more), lse)
        assert torch.equal(into, out)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(seqused_k=torch.tensor([3])), "seqused_k must be None where gradients"),
        (dict(alibi_slopes=torch.ones(2)), "alibi_slopes must be None where gradients"),
        pytest.param(
            dict(block_table=torch.zeros(1, 1, dtype=torch.int32)), "block_table", id="block_table-",
            marks=pytest.mark.needs("PyTorch 2.12", "block_table" in str(aten._flash_attention_forward.default._schema)),
        ),
        (dict(return_debug_mask=True), "return_debug_mask must be False"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_sdpa_flash_refuses(on_cpu, more, words):
    """Also what would give a wrong gradient without a word."""
    q, k, v = draw(*[(1, 8, 2, 16)] * 3)
    more = dict(more)
    debug = more.pop("return_debug_mask", False)
    with pytest.raises(NotImplementedError, match=words):
        aten._flash_attention_forward(q, k, v, None, None, 8, 8, 0.0, False, debug, **more)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=str)
def test_sdpa_flash_memory_order_is_what_the_fakes_promise(on_cpu, order):
    """A compiled graph relies on the strides that PyTorch's own fakes tell."""
    sizes = (2, 4, 20, 16)
    leaves = [
        x.detach().permute([order.index(n) for n in range(4)]).requires_grad_() for x in draw(*[[sizes[n] for n in order]] * 3)
    ]

    def strides(leaves):
        found = aten._scaled_dot_product_flash_attention(*leaves)
        grads = torch.autograd.grad(found[0], leaves, torch.empty_like(found[0]))
        return [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in (*found, *grads)]

    fakes = [torch.empty_strided(x.shape, x.stride(), device="meta", requires_grad=True) for x in leaves]
    assert strides(leaves) == strides(fakes)


def test_sdpa_flash_hook_is_activated_and_restored():
    """As PyTorch's registry has it. A build without CUDA has no kernel there to begin with."""

    def served():
        return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_flash_attention_forward", "CUDA")

    before = served()
    assert "tfkern" in hook.list_flash_attention_impls()
    assert hook.current_flash_attention_impl() is None  # importing activates nothing
    hook.activate_flash_attention_impl("tfkern")
    try:
        assert hook.current_flash_attention_impl() == "tfkern"
        assert served()
    finally:
        hook.restore_flash_attention_impl()
    assert hook.current_flash_attention_impl() is None
    assert served() == before
    handle = torch_flash._Handle("CUDA")
    assert served()
    handle.remove()  # whoever may still hold it
    assert served() == before


@pytest.mark.gpu  # the hook serves CUDA devices; its ops are tested on the CPU
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_sdpa_flash_hook_on_a_gpu(dtype):
    """F.scaled_dot_product_attention, and an encoder layer's inference in C++, by tfkern's kernels: counted in a profile."""
    leaves = draw(*[(2, 4, 197, 64)] * 3, dtype=dtype, device="cuda")
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True, device="cuda", dtype=dtype).eval()
    x = torch.randn(2, 197, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        plain = layer(x)
    do = torch.randn(2, 4, 197, 64, device="cuda", dtype=dtype)
    hook.activate_flash_attention_impl("tfkern")
    try:
        with hook.sdpa_kernel(hook.SDPBackend.FLASH_ATTENTION), torch.profiler.profile() as profile:
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            grads = torch.autograd.grad(out, leaves, do)
            with torch.no_grad():
                encoded = layer(x)
    finally:
        hook.restore_flash_attention_impl()
    names = [event.key for event in profile.key_averages()]
    assert any("flash_bwd" in name for name in names), names
    assert sum(event.count for event in profile.key_averages() if event.key.startswith("flash_fwd")) == 2, names
    wanted = tfkern.attention(*leaves, is_causal=True)
    for a, b in zip((out, *grads), (wanted, *torch.autograd.grad(wanted, leaves, do)), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(encoded, plain, rtol=2e-2, atol=2e-2)
