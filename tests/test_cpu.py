"""The backend cpu: what goes through PyTorch's fused op does, in calls of any kind, and gives what the naive formula gives."""

import itertools

import pytest
import torch

import tfkern
from tfkern import cpu_calls, cpu_fused, eager_groups, layout, reference, sequences
from tfkern.backends import cpu

pytestmark = pytest.mark.cpu
N, M, B, H = 330, 290, 3, 4
ORDERED = sequences.Order.tensors


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(*shape):
    return tensor(*shape, seed=9) < 0.5


FUSED = {
    "full": {}, "causal": dict(is_causal=True), "causal tall": dict(is_causal=True, causal_alignment="lower_right"),
    "window": dict(window=(20, 11)), "window lower right": dict(window=(20, 11), causal_alignment="lower_right"),
    "left only": dict(window=(40, None)), "right only": dict(window=(None, 7)), "causal window": dict(is_causal=True, window=(33, 0)),
    "lengths": dict(key_lengths=torch.tensor([200, 0, 200])), "other lengths": dict(key_lengths=torch.tensor([7, 290, 31])),
    "lengths, lower right": dict(key_lengths=torch.tensor([200, 90, 200]), window=(20, 11), causal_alignment="lower_right"),
    "mask of keys": dict(attn_mask=seen(B, 1, 1, M)),
    "mask of padding": dict(attn_mask=(torch.arange(M) < torch.tensor([200, 0, 13])[:, None])[:, None, None]),
    "mask of padding for all": dict(attn_mask=torch.arange(M)[None] < 100, is_causal=True),
    "mask of padding and more": dict(attn_mask=seen(B, 1, 1, M) & (torch.arange(M) < 150), window=(40, 40)), "mask": dict(attn_mask=seen(N, M)), "causal mask": dict(attn_mask=seen(B, 1, N, M), is_causal=True),
    "mask of queries": dict(attn_mask=seen(B, H, N, 1)), "mask and window": dict(attn_mask=seen(1, H, N, M), window=(30, 5)),
    "mask and lengths": dict(attn_mask=seen(B, H, N, M), key_lengths=torch.tensor([200, 0, 200])),
    "bias": dict(attn_mask=tensor(H, N, M)), "causal bias": dict(attn_mask=tensor(B, 1, N, M), is_causal=True), "bias, window": dict(attn_mask=tensor(N, M), window=(9, 40)),
    "slopes": dict(alibi_slopes=tensor(H).abs()), "slopes of each, causal": dict(alibi_slopes=tensor(B, H).abs(), is_causal=True),
    "slopes, lower right": dict(alibi_slopes=-tensor(H).abs(), causal_alignment="lower_right", attn_mask=seen(B, 1, 1, M)),
    "slopes, right of the diagonal": dict(
        alibi_slopes=tensor(H).abs(), window=(None, 9), causal_alignment="lower_right"
    ),
    "slopes, all": dict(alibi_slopes=tensor(H).abs(), window=(1000, 1000)),
    "slopes, window": dict(alibi_slopes=tensor(H).abs(), window=(30, 10)),
    "slopes, bias": dict(alibi_slopes=tensor(H).abs(), attn_mask=tensor(1, H, 1, M)),
    "slopes, causal lower right": dict(alibi_slopes=tensor(H).abs(), is_causal=True, causal_alignment="lower_right"),
    "slopes, sinks": dict(alibi_slopes=tensor(H).abs(), sinks=tensor(H)),
    "slopes, lengths": dict(
        alibi_slopes=tensor(H).abs(), key_lengths=torch.tensor([200, 0, 7]), causal_alignment="lower_right"
    ),
    "sinks": dict(sinks=tensor(H)), "sinks, lengths": dict(sinks=tensor(H), key_lengths=torch.tensor([200, 0, 200])),
    "scale": dict(scale=0.31),
}  # fmt: skip


def results(function, options, q, k, v, **more) -> list:
    """out, lse, and the gradients of q, k, v and sinks."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = {n: x.detach().requires_grad_() if n == "sinks" else x for n, x in options.items()}
    leaves += [x for n, x in options.items() if n == "sinks"]
    out, lse = function(*leaves[:3], **options, **more, return_lse=True)
    do = tensor(*out.shape, seed=5).to(out.dtype)
    return [out, lse, *torch.autograd.grad(out, leaves, do)]


def qkv(kv_heads=H, dims=(16, 16), dtype=torch.float64):
    shapes = (B, H, N, dims[0]), (B, kv_heads, M, dims[0]), (B, kv_heads, M, dims[1])
    return [tensor(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]


def never(*args, **options):
    raise AssertionError("this was for PyTorch's fused op")


@pytest.fixture
def fused_alone(monkeypatch):
    """Nothing else may compute."""
    monkeypatch.setattr(cpu, "forward_group", never)
    monkeypatch.setattr(cpu, "backward_group", never)


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED.keys())
def test_fused(options, fused_alone):
    q, k, v = qkv()
    found, wanted = (results(f, options, q, k, v) for f in (tfkern.attention, reference.attention))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in FUSED if "attn_mask" not in FUSED[name]])
def test_few_rows(name, fused_alone):
    """Where key lengths become a mask."""
    options = FUSED[name] | ({"key_lengths": torch.tensor([5, 0, 19])} if "key_lengths" in FUSED[name] else {})
    q, k, v = (x[:, :, :n] for x, n in zip(qkv(), (9, 20, 20), strict=True))
    found, wanted = (results(f, options, q, k, v) for f in (tfkern.attention, reference.attention))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 4), (3, 5), (5, 3), (1, 4), (4, 1)])
def test_every_band_of_few_rows(n, m, alignment, fused_alone):
    """Where one key more or less is hidden."""
    q, k, v = tensor(1, 2, n, 4), tensor(1, 2, m, 4, seed=1), tensor(1, 2, m, 4, seed=2)
    sides = [None, *range(6)]
    for window in itertools.product(sides, sides):
        options = dict(window=window, causal_alignment=alignment)
        found, wanted = (results(f, options, q, k, v) for f in (tfkern.attention, reference.attention))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, w=window: f"{w}: {text}")


@pytest.mark.parametrize("step", [1, 37, 1000])
@pytest.mark.parametrize(
    "name", ["window", "mask", "lengths, lower right", "bias, window", *(name for name in FUSED if "slopes" in name)]
)
def test_any_rows_of_a_call(name, step, fused_alone, monkeypatch):
    monkeypatch.setattr(cpu_calls, "STEPS", {step: 1.0})
    monkeypatch.setattr(cpu_calls, "ELEMENTS", 1)
    monkeypatch.setattr(cpu_calls, "BLOCK", step)
    monkeypatch.setattr(cpu_calls, "SLOPES_ELEMENTS", H * step**2)
    tfkern.call._problems.clear()  # which keep their calls
    q, k, v = qkv()
    found, wanted = (results(f, FUSED[name], q, k, v) for f in (tfkern.attention, reference.attention))
    tfkern.call._problems.clear()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["full", "causal", "window", "mask of queries", "other lengths", "sinks"])
@pytest.mark.parametrize("kind", ["groups", "narrow values", "wide values", "strided", "transposed"])
def test_operands(name, kind, fused_alone):
    """Key heads that are shared, head dims that differ, tensors that the op would misread."""
    q, k, v = qkv(2 if kind == "groups" else H, {"narrow values": (16, 9), "wide values": (9, 16)}.get(kind, (16, 16)))
    if kind == "strided":
        q, k, v = (torch.stack([x, x * 0], -1)[..., 0] for x in (q, k, v))
    elif kind == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    found, wanted = (results(f, FUSED[name], q, k, v, enable_gqa=True) for f in (tfkern.attention, reference.attention))
    assert found[0].stride() == layout.strides_in_order_of(q, v.shape[-1])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


LENGTHS = {
    "one after the other": [4] * 30, "in turn": [3, 5, 0] * 12, "each its own": [*range(9)], "long ones": [60, 3, 60, 3, 60],
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, dict(is_causal=True), dict(sinks=tensor(H)), dict(dropout_p=0.3), dict(softcap=3.0)], ids=str
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_packed_sequences_of_equal_lengths(lengths, options, backend):
    """Side by side they are a view; scattered and short, a copy; else there is a call for each."""
    ends_q = torch.tensor([0, *lengths]).cumsum(0)
    ends_k = torch.tensor([0, *(n + 1 for n in lengths)]).cumsum(0)
    q, k, v = tensor(int(ends_q[-1]) + 2, H, 8), tensor(int(ends_k[-1]), H, 8, seed=1), tensor(int(ends_k[-1]), H, 8, seed=2)

    def run(function, **more):
        def packed(q, k, v, **rest):
            torch.manual_seed(1)
            return function(q, k, v, ends_q, ends_k, **rest, **more)

        return results(packed, options, q, k, v)

    torch.testing.assert_close(
        run(tfkern.attention_varlen, backend=backend), run(reference.attention_varlen), rtol=1e-8, atol=1e-8
    )


def test_short_sequences_take_few_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        cpu_fused.compat, "flash", lambda *a, flash=cpu_fused.compat.flash, **o: calls.append(a) or flash(*a, **o)
    )
    q = torch.randn(2048, 2, 8)
    ends = torch.arange(0, 2049, 4)
    tfkern.attention_varlen(q, q, q, ends, ends)
    assert len(calls) == 1
    ends = torch.tensor([0] + [3, 5] * 256).cumsum(0)
    tfkern.attention_varlen(q, q, q, ends, ends)
    assert len(calls) == 3


@pytest.mark.parametrize("name", [*FUSED, "dropout", "softcap"])
@pytest.mark.parametrize("size", [330, 9])
def test_out_alone(name, size):
    """Without gradients, and small: other ways to the same."""
    options = dict(FUSED, dropout=dict(dropout_p=0.2), softcap=dict(softcap=4.0))[name]
    cut = {n: x[..., :size, :] if n == "attn_mask" and x.shape[-2] > 1 else x for n, x in options.items()}
    q, k, v = qkv()
    torch.manual_seed(3)
    wanted = results(tfkern.attention, cut, q[:, :, :size], k, v)[0]
    torch.manual_seed(3)
    with torch.no_grad():
        found = tfkern.attention(q[:, :, :size], k, v, **cut)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert found.stride() == wanted.stride()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_hidden_keys_reach_nobody_without_gradients_either(poison):
    q, k, v = qkv()
    keep = torch.arange(M) != 100
    clean = tfkern.attention(q, k, v, keep)
    k[:, :, 100] = v[:, :, 100] = poison
    assert torch.equal(tfkern.attention(q, k, v, keep), clean)


def test_lengths_are_looked_at_in_every_call():
    """Not only in the first of its kind."""
    q, k, v = qkv()
    ends = torch.tensor([0, 5, 9])
    for _ in range(2):
        tfkern.attention(q, k, v, key_lengths=torch.tensor([3, 290, 0]))
    for wrong in ([3, 291, 0], [-1, 3, 3]):
        with pytest.raises(ValueError, match="key_lengths must lie in 0"):
            tfkern.attention(q, k, v, key_lengths=torch.tensor(wrong))
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    for _ in range(2):
        tfkern.attention_varlen(*packed, ends, ends)
    for wrong in ([0, 9, 5], [1, 5, 9], [0, 5, 10**4]):
        with pytest.raises(ValueError, match="cu_seqlens_k must rise from 0"):
            tfkern.attention_varlen(*packed, ends, torch.tensor(wrong))


@pytest.mark.parametrize("features", ["plain", "biased", "dropout"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_sequences_sorted_by_length(backend, kind, features, monkeypatch):
    """Copied into that order or not, each has its own bias, slopes and bits of dropout."""
    lengths, most = [5, 90, 5, 0, 90, 17, 5], 90
    count = len(lengths)
    options = {"biased": dict(is_causal=True, sinks=tensor(H)), "dropout": dict(dropout_p=0.5, window=(30, 30))}.get(
        features, {}
    )
    leaves = [tensor(count, H, most, 16, seed=i) for i in range(3)]
    if features == "biased":
        options |= dict(attn_mask=tensor(count, 1, most, most), alibi_slopes=tensor(count, H).abs())
    function = tfkern.attention
    if kind == "packed":
        function, of_keys = tfkern.attention_varlen, [7, 88, 7, 0, 88, 3, 7]
        for i, own in enumerate((lengths, of_keys, of_keys)):
            leaves[i] = leaves[i].transpose(1, 2)[torch.arange(most) < torch.tensor(own)[:, None]]
        ends, ends_of_keys = (torch.tensor([0, *itertools.accumulate(x)]) for x in (lengths, of_keys))
        options |= dict(cu_seqlens_q=ends, cu_seqlens_k=ends_of_keys)
    else:
        options |= dict(key_lengths=torch.tensor(lengths))
    found, ordered = [], []
    monkeypatch.setattr(sequences.Order, "tensors", lambda *a: ordered.append(a) or ORDERED(*a))
    for few in (0, 10**9):
        assert not ordered
        monkeypatch.setattr(sequences, "FEW", few)
        monkeypatch.setattr(cpu, "SMALL", 0)
        torch.manual_seed(0)
        tfkern.call._problems.clear()
        differentiable = {
            n: x.clone().requires_grad_() for n, x in options.items() if n in ("attn_mask", "alibi_slopes", "sinks")
        }
        own = [x.clone().requires_grad_() for x in leaves]
        out, lse = function(*own, **options | differentiable, backend=backend, return_lse=True)
        wanted = [*own, *differentiable.values()]
        found.append([out, lse, *torch.autograd.grad((out.square().sum() + lse[lse > -1e9].sin().sum()), wanted)])
    assert ordered
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    if features != "dropout":
        with torch.no_grad():
            wanted = (reference.attention_varlen if kind == "packed" else reference.attention)(*leaves, **options)
        torch.testing.assert_close(found[1][0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", ["window", "ALiBi", "lengths", "mask", "dropout", "packed"])
def test_another_default_device_is_none_of_its_business(options):
    """Nor is inference mode, in which masks are made that the next calls find."""
    q, k, v = qkv()
    function, given = tfkern.attention, {
        "window": dict(window=(2, 3)),
        "ALiBi": dict(alibi_slopes=torch.rand(H)),
        "lengths": dict(key_lengths=torch.tensor([3, 290, 0])),
        "mask": dict(attn_mask=torch.rand(M) < 0.5, window=(9, 9)),
        "dropout": dict(dropout_p=0.5),
        "packed": dict(cu_seqlens_q=torch.tensor([0, 5, 9, 12]), cu_seqlens_k=torch.tensor([0, 5, 9, 12])),
    }[options]  # fmt: skip
    if options == "packed":
        function, (q, k, v) = tfkern.attention_varlen, (x[0, :, :12].transpose(0, 1).contiguous() for x in (q, k, v))
    tfkern.call._problems.clear(), cpu_calls._band.cache_clear(), cpu_calls._nearness.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        torch.manual_seed(0)
        first = function(q, k, v, **given)
    found = []
    for device in ("meta", "cpu"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        gradient = torch.ones_like(first)
        with torch.device(device):
            torch.manual_seed(0)
            out = function(*leaves, **given)
            found.append([out, *torch.autograd.grad(out, leaves, gradient)])
    assert torch.equal(first, found[0][0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_dense_beside_padding(name):
    """V's head dim is half of Q's: the op gets V padded, and what it gives is cut. A V that is cut from such memory itself has
    the strides of that, and no gradient may."""
    q, k, v = (tensor(B, H, N, 16, seed=i) for i in range(3))
    leaves = dict(q=q, k=k, v=v[..., :8])
    leaves[name].requires_grad_()
    out = tfkern.attention(*leaves.values())
    (gradient,) = torch.autograd.grad(out.sum(), leaves[name])
    assert out.is_contiguous()
    assert gradient.is_contiguous()


def test_a_row_of_large_logits_goes_by_tiles(monkeypatch):
    """Beside 1e5 the log of a sum is lost in float32, so that the op's backward would have other weights than its forward."""
    asked = []
    monkeypatch.setattr(cpu, "backward_group", lambda *a: asked.append(a) or eager_groups.backward_group(*a))
    q, k, v = qkv(dtype=torch.float32)
    results(tfkern.attention, {}, q, k, v)
    assert not asked
    q[1, 2, 3] *= 1e5
    results(tfkern.attention, {}, q, k, v)
    assert len(asked) == 1


def test_without_the_op(monkeypatch):
    """In a PyTorch that has it elsewhere, tiles do everything."""
    monkeypatch.setattr(cpu_calls.compat, "flash", None)
    tfkern.call._problems.clear()
    q, k, v = qkv()
    found, wanted = (results(f, dict(window=(5, 5)), q, k, v) for f in (tfkern.attention, reference.attention))
    tfkern.call._problems.clear()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_not_for_other_devices():
    meta = torch.empty(1, 1, 4, 8, device="meta")
    assert "for tensors on a CPU" in tfkern.explain(meta, meta, meta, backend="cpu")
