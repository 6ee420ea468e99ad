"""flash-attn's functions by their names, against the oracle."""

import functools
import inspect

import pytest
import torch

from tfkern import reference
from tfkern.integrations import flash_attn
from tfkern.testing import budget

B, N, M, H, D = 2, 5, 9, 4, 8
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
COMMON = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
ARGUMENTS = {
    "flash_attn_func": f"q k v {COMMON}",
    "flash_attn_kvpacked_func": f"q kv {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv {COMMON}",
    "flash_attn_varlen_func": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {COMMON} block_table",
    "flash_attn_varlen_kvpacked_func": f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {COMMON}",
}
OPTIONS = {
    "full": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(3, 1)),
    "left window, causal": dict(window_size=(2, -1), causal=True),
    "right window": dict(window_size=(-1, 0)),
    "right window, its left another negative": dict(window_size=(-2, 1)),
    "scale": dict(softmax_scale=0.2),
    "softcap": dict(softcap=3.0, causal=True),
    "alibi": dict(alibi_slopes=SLOPES),
    "alibi a batch": dict(alibi_slopes=torch.stack([SLOPES, SLOPES.flip(0)]), causal=True),
    "dropout": dict(dropout_p=0.25),
    "everything": dict(dropout_p=0.25, causal=True, window_size=(4, 4), softcap=5.0, alibi_slopes=SLOPES, deterministic=True),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == ARGUMENTS[name].split()
    defaults = [p.default for p in parameters.values() if p.default is not inspect.Parameter.empty]
    assert defaults == [0.0, None, False, (-1, -1), 0.0, None, False, False, None][: len(defaults)]
    assert len(defaults) == 8 + (name == "flash_attn_varlen_func")
    assert name in flash_attn.__all__


def draw(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[dict, dict]:
    """(tensors, lengths) of a function: fewer heads for keys where it takes them, and a row of no sequence."""
    generator = torch.Generator().manual_seed(seed)
    varlen, packed = "varlen" in name, "qkv" in name
    heads = H if packed else 2
    q, k, v = (
        torch.randn(*((n,) if varlen else (B, n)), h, D, generator=generator).to(dtype)
        for n, h in ((N, H), (N if packed else M, heads), (N if packed else M, heads))
    )
    tensors = dict(q=q, k=k, v=v)
    if packed:
        tensors = dict(qkv=torch.stack((q, k, v), -3))
    elif "kvpacked" in name:
        tensors = dict(q=q, kv=torch.stack((k, v), -3))
    if not varlen:
        return tensors, {}
    cu_q = torch.tensor([0, 3, N - 1], dtype=torch.int32)
    cu_k = torch.tensor([0, 7, M], dtype=torch.int32)
    if packed:
        return tensors, dict(cu_seqlens=cu_q, max_seqlen=3)
    return tensors, dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=3, max_seqlen_k=7)


def oracle(naive=reference.attention, q=None, k=None, v=None, kv=None, qkv=None, **options):
    """The same in float64 or in the naive form, by the reference."""
    if qkv is not None:
        q, k, v = qkv.unbind(-3)
    if kv is not None:
        k, v = kv.unbind(-3)
    window = tuple(None if side < 0 else side for side in options.pop("window_size", (-1, -1)))
    more = dict(
        dropout_p=options.pop("dropout_p", 0.0), scale=options.pop("softmax_scale", None), window=window,
        is_causal=options.pop("causal", False), causal_alignment="lower_right", softcap=options.pop("softcap", 0.0) or None,
        alibi_slopes=options.pop("alibi_slopes", None), return_lse=True, enable_gqa=True,
    )  # fmt: skip
    if q.dim() == 4:
        out, lse = naive(*(x.transpose(1, 2) for x in (q, k, v)), **more)
        return out.transpose(1, 2), lse
    cu_q = options.pop("cu_seqlens_q", options.get("cu_seqlens"))
    cu_k = options.pop("cu_seqlens_k", options.get("cu_seqlens"))
    return reference.attention_varlen(q, k, v, cu_q, cu_k, naive=naive, **more)


def results(function, tensors: dict, options: dict) -> dict:
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
    with torch.random.fork_rng():
        torch.manual_seed(99)
        out, lse = function(**leaves, **options)[:2]
    generator = torch.Generator().manual_seed(5)
    seeds = [torch.randn(x.shape, generator=generator).to(x) for x in (out, lse)]
    grads = torch.autograd.grad((out, lse), list(leaves.values()), seeds)
    return dict(out=out, lse=lse, **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)})


def test_windows_that_are_none():
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(TypeError, match=r"window's left must be an integer or None, but is -2\.0"):
        flash_attn.flash_attn_func(q, q, q, window_size=(-2.0, 0))
    full = flash_attn.flash_attn_func(q, q, q)
    for window in ((-2, -7), (None, -1)):
        assert torch.equal(flash_attn.flash_attn_func(q, q, q, window_size=window), full)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_oracle(name, dtype):
    """All options: out, lse and every gradient within the budget."""
    tensors, lengths = draw(name, dtype)
    for option, chosen in OPTIONS.items():
        options = chosen | lengths

        def flash(**o):
            return oracle(functools.partial(reference.flash, out_dtype=dtype), **o)

        def wide(form, tensors=tensors, options=options):
            return results(form, {n: x.double() for n, x in tensors.items()}, options)

        plains = [results(oracle, tensors, options), results(flash, {n: x.float() for n, x in tensors.items()}, options)]
        found = results(getattr(flash_attn, name), tensors, options | dict(return_attn_probs=True))
        assert found["out"].dtype == dtype
        assert found["lse"].dtype == torch.float32
        errors = budget.judge(found, wide(oracle), plains, functools.partial(wide, flash))
        assert all(e.ok for e in errors), (option, *map(str, errors))
    print(f"{len(OPTIONS)} options of {name}, {dtype}")


def test_what_comes_back():
    tensors, _ = draw("flash_attn_func", torch.float32)
    out = flash_attn.flash_attn_func(**tensors)
    assert out.shape == (B, N, H, D)
    assert out.is_contiguous()
    again, lse, probabilities = flash_attn.flash_attn_func(**tensors, return_attn_probs=True)
    assert torch.equal(again, out)
    assert lse.shape == (B, H, N)
    assert probabilities is None


def test_causal_is_lower_right():
    """The documented picture: two queries, five keys."""
    v = torch.eye(5)[None, :, None]
    seen = flash_attn.flash_attn_func(torch.zeros(1, 2, 1, 5), torch.zeros(1, 5, 1, 5), v, causal=True)[0, :, 0] > 0
    assert seen.tolist() == [[True] * 4 + [False], [True] * 5]
    v = torch.eye(2)[None, :, None]
    seen = flash_attn.flash_attn_func(torch.zeros(1, 5, 1, 2), torch.zeros(1, 2, 1, 2), v, causal=True)[0, :, 0] > 0
    assert seen.tolist() == [[False] * 2] * 3 + [[True, False], [True, True]]


def test_in_the_kernels(monkeypatch):
    monkeypatch.setenv("TFKERN_BACKENDS", "portable")
    for name in ("flash_attn_func", "flash_attn_varlen_qkvpacked_func"):
        tensors, lengths = draw(name, torch.float32)
        options = OPTIONS["everything"] | lengths
        want = results(oracle, {n: x.double() for n, x in tensors.items()}, options)
        for n, x in results(getattr(flash_attn, name), tensors, options | dict(return_attn_probs=True)).items():
            torch.testing.assert_close(x.double(), want[n], rtol=1e-5, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def test_errors():
    q = torch.zeros(B, N, H, D)
    with pytest.raises(TypeError, match=r"window_size must be a pair \(left, right\), -1 meaning unbounded, but is 3"):
        flash_attn.flash_attn_func(q, q, q, window_size=3)
    with pytest.raises(ValueError, match=r"kv must have shape \(B, M, 2, H, D\), keys before values, but is \(2, 5, 4, 8\)"):
        flash_attn.flash_attn_kvpacked_func(q, q)
    with pytest.raises(ValueError, match="with enable_gqa the heads of query, 4, must be a multiple"):
        flash_attn.flash_attn_func(q, q[:, :, :3], q[:, :, :3])
    cu = torch.tensor([0, N], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, N, N, block_table=cu)
