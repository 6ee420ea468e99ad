"""MultiheadAttention against torch.nn.MultiheadAttention: PyTorch's own samples, a grid of options, state dicts, errors."""

import copy
import functools
import io
import itertools
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tfkern
from tfkern.testing import budget

sys.path.append(str(Path(__file__).resolve().parent))
import pytorch_samples

Theirs, Ours = nn.MultiheadAttention, tfkern.nn.MultiheadAttention
TENSORS = ("query", "key", "value", "attn_mask", "key_padding_mask")


def results(layer, inputs: dict, do_seed: int = 7) -> dict[str, torch.Tensor]:
    """out, weights and the gradients of (out . do + weights . dweights) by every parameter and floating-point input; inputs that
    are one tensor stay one."""
    made = {}
    for x in inputs.values():
        if isinstance(x, torch.Tensor) and id(x) not in made:
            made[id(x)] = x.detach().requires_grad_() if x.is_floating_point() else x
    given = {n: made.get(id(x), x) for n, x in inputs.items()}
    leaves = {n: x for n, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    leaves |= dict(layer.named_parameters())
    out, weights = layer(**given)
    found = dict(out=out) if weights is None else dict(out=out, weights=weights)
    generator = torch.Generator().manual_seed(do_seed)
    seeds = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in found.values()]
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), seeds, allow_unused=True)
    return found | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    made = {id(x): x.to(dtype) for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return {n: made.get(id(x), x) for n, x in inputs.items()}


def theirs(layer, inputs: dict, dtype: torch.dtype, backend=SDPBackend.MATH) -> dict[str, torch.Tensor]:
    """What PyTorch makes of it in another dtype."""
    with sdpa_kernel([backend, SDPBackend.MATH]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # masks of two types, which are deprecated
        return results(copy.deepcopy(layer).to(dtype), cast(inputs, dtype))


def same_in_float64(layer: Theirs, inputs: dict) -> None:
    """Ours, made from theirs, gives what theirs gives: outputs, weights, every gradient."""
    layer, inputs = copy.deepcopy(layer).double(), cast(inputs, torch.float64)
    want = theirs(layer, inputs, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = results(Ours.from_torch(layer), inputs)
    assert list(found) == list(want)
    for name, x in want.items():
        assert (found[name] is None) == (x is None), name
        if x is not None:
            torch.testing.assert_close(found[name], x, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False])
def test_module_info(training):
    """All of PyTorch's own samples, with and without weights."""
    info = next(m for m in pytorch_samples.load("common_modules").module_db if m.module_cls is Theirs)
    samples = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
    count = 0
    for sample in samples:
        torch.manual_seed(count)
        layer = Theirs(*sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=torch.float64)
        layer.train(training)
        given = dict(zip(TENSORS, sample.forward_input.args, strict=False)) | sample.forward_input.kwargs
        for weights in (dict(need_weights=False), {}, dict(average_attn_weights=False)):
            same_in_float64(layer, given | weights)
            count += 1
    print(f"{count} calls of {len(samples)} ModuleInfo samples, training={training}: outputs, weights, every gradient")
    assert count >= 3 * 64


N, H, L, S, E = 2, 2, 4, 5, 6


def masks(attn: str, n_q: int, n_k: int, batched: bool, kind: str) -> dict:
    """attn_mask of dims and dtype, or key_padding_mask of a dtype; every query sees a key."""
    generator = torch.Generator().manual_seed(3)
    name, _, dtype = attn.partition(" ")
    if not name:
        return {}
    if kind == "key_padding_mask":
        shape = (N, n_k) if batched else (n_k,)
    else:
        shape = (n_q, n_k) if name == "2-D" else ((N if batched else 1) * H, n_q, n_k)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype == "bool":
        x = x > 0.7
        x[..., 0] = False
    return {kind: x}


def inputs_of(kind: str, batch_first: bool, kdim: int, vdim: int, seed=0) -> dict:
    """query, key and value: the same tensor, key and value the same, all different, or without batch."""
    generator = torch.Generator().manual_seed(seed)

    def one(length, width):
        shape = (length, width) if kind == "unbatched" else (N, length, width) if batch_first else (length, N, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = one(L, E)
    if kind == "self":
        return dict(query=q, key=q, value=q)
    k = one(S, kdim)
    return dict(query=q, key=k, value=k if kind == "memory" else one(S, vdim))


GRID = list(
    itertools.product(
        [True, False],  # batch_first
        [dict(), dict(kdim=3, vdim=5), dict(bias=False), dict(kdim=3, vdim=5, bias=False)],
        [dict(), dict(add_bias_kv=True), dict(add_zero_attn=True), dict(add_bias_kv=True, add_zero_attn=True)],
        ["self", "memory", "different", "unbatched"],
        ["", "2-D bool", "2-D float", "3-D bool", "3-D float"],
        ["", "pad bool", "pad float"],
    )
)


@pytest.mark.parametrize("attn", ["", "2-D bool", "2-D float", "3-D bool", "3-D float"])
def test_grid(attn):
    """Every combination of the options, in float64."""
    count = 0
    for batch_first, shapes, appended, kind, mask, pad in GRID:
        if mask != attn or ("kdim" in shapes and kind in ("self", "memory")):
            continue
        torch.manual_seed(1)
        layer = Theirs(E, H, batch_first=batch_first, **shapes, **appended, dtype=torch.float64)
        given = inputs_of(kind, batch_first, shapes.get("kdim", E), shapes.get("vdim", E))
        n_k = L if kind == "self" else S
        for more, which in ((attn, "attn_mask"), (pad, "key_padding_mask")):
            given |= masks(more, L, n_k, kind != "unbatched", which)
        same_in_float64(layer, given | dict(need_weights=False))
        count += 1
    print(f"{count} combinations of options with attn_mask {attn or 'None'}: outputs and every gradient")
    assert count > 200


@pytest.mark.parametrize("kind", ["self", "memory", "unbatched"])
@pytest.mark.parametrize("pad", ["", "pad bool", "pad float"])
@pytest.mark.parametrize("appended", [{}, dict(add_bias_kv=True), dict(add_zero_attn=True)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_causal_hint(kind, pad, appended, batch_first):
    layer = Theirs(E, H, batch_first=batch_first, dtype=torch.float64, **appended)
    given = inputs_of(kind, batch_first, E, E)
    n_k = given["key"].shape[-2 if batch_first or kind == "unbatched" else 0]
    causal = nn.Transformer.generate_square_subsequent_mask(n_k, dtype=torch.float64)[:L]
    given |= masks(pad, L, n_k, kind != "unbatched", "key_padding_mask")
    for mask, weights in itertools.product((causal, causal < 0), (False, True)):
        same_in_float64(layer, given | dict(attn_mask=mask, is_causal=True, need_weights=weights))


ROW, COLUMN = torch.arange(L)[:, None], torch.arange(S)
UPPER = torch.zeros(L, S, dtype=torch.float64).masked_fill(ROW < COLUMN, -torch.inf)
HINTED = {  # what is said to be causal
    "with ALiBi": UPPER - 0.7 * (ROW - COLUMN).abs(),
    "with ALiBi of each head": (UPPER - (ROW - COLUMN).abs()) * torch.linspace(0.2, 1.0, N * H)[:, None, None],
    "with a window": (ROW < COLUMN) | (ROW > COLUMN + 1),
    "a prefix": (ROW < COLUMN) & (COLUMN > 2),
    "lower right": ROW + S - L < COLUMN,
}


@pytest.mark.parametrize("kind", ["self", "memory", "unbatched"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_mask_that_is_not_what_the_hint_says(batch_first, kind):
    """As in PyTorch: beside padding, and where weights are wanted, the mask counts, and elsewhere the hint."""
    layer = Theirs(E, H, batch_first=batch_first, dtype=torch.float64)
    given = inputs_of(kind, batch_first, E, E)
    n_k = L if kind == "self" else S
    for name, mask in HINTED.items():
        given["attn_mask"] = (mask[:H] if mask.dim() == 3 and kind == "unbatched" else mask)[..., :n_k]
        for pad, weights in itertools.product(("", "pad bool", "pad float"), (False, True)):
            padding = masks(pad, L, n_k, kind != "unbatched", "key_padding_mask")
            same_in_float64(layer, given | padding | dict(is_causal=True, need_weights=weights))
            if pad and not weights:
                hinted, plain = (
                    theirs(layer, given | padding | dict(is_causal=hint, need_weights=False), torch.float64)
                    for hint in (True, False)
                )
                torch.testing.assert_close(hinted["out"], plain["out"], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_the_budget(dtype):
    """Errors against the float64 layer beside those of PyTorch's layer in the same dtype."""
    for kind, options, attn, pad in [
        ("self", {}, "", "pad bool"),
        ("self", dict(batch_first=True), "3-D float", ""),
        ("different", dict(kdim=3, vdim=5), "2-D bool", "pad float"),
        ("memory", dict(batch_first=True, add_bias_kv=True, add_zero_attn=True), "2-D bool", "pad bool"),
    ]:
        torch.manual_seed(2)
        layer = Theirs(E, H, **options).to(dtype)
        given = inputs_of(kind, options.get("batch_first", False), options.get("kdim", E), options.get("vdim", E))
        n_k = L if kind == "self" else S
        given |= masks(attn, L, n_k, True, "attn_mask") | masks(pad, L, n_k, True, "key_padding_mask")
        given = cast(given | dict(need_weights=False), dtype)
        wide = functools.partial(theirs, layer, given, torch.float64)
        plains = [theirs(layer, given, dtype, b) for b in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = results(Ours.from_torch(layer), given)
        errors = budget.judge(found, wide(), plains, wide, products=dtype)
        assert all(e.ok for e in errors), "\n".join(map(str, errors))


def test_in_the_kernels(monkeypatch):
    monkeypatch.setenv("TFKERN_BACKENDS", "portable")
    layer = Theirs(E, H)
    for batch_first, kind in ((True, "self"), (False, "memory")):
        layer.batch_first = batch_first
        given = cast(inputs_of(kind, batch_first, E, E), torch.float32)
        given |= masks("pad bool", L, L if kind == "self" else S, True, "key_padding_mask") | dict(need_weights=False)
        want = theirs(layer, given, torch.float64)
        for name, x in results(Ours.from_torch(layer), given).items():
            torch.testing.assert_close(x.double(), want[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [{}, dict(kdim=3, vdim=5), dict(add_bias_kv=True), dict(bias=False)], ids=str)
def test_state_dict_both_ways(options):
    torch.manual_seed(0)
    a, b = Theirs(E, H, **options), Ours(E, H, **options)
    assert list(a.state_dict()) == list(b.state_dict())
    b.load_state_dict(a.state_dict())
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    a = Theirs(E, H, **options)
    a.load_state_dict(b.state_dict())
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_same_initial_parameters():
    torch.manual_seed(0)
    a = Theirs(E, H, add_bias_kv=True, device="cpu", dtype=torch.float64)
    torch.manual_seed(0)
    b = Ours(E, H, add_bias_kv=True, device="cpu", dtype=torch.float64)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def test_from_torch_shares_parameters():
    layer = Theirs(E, H, dropout=0.3, add_bias_kv=True).eval()
    ours = Ours.from_torch(layer)
    assert all(x is y for x, y in zip(layer.parameters(), ours.parameters(), strict=True))
    assert (ours.dropout, ours.training, ours.out_proj is layer.out_proj) == (0.3, False, True)
    ours.register_parameter("extra", None)
    ours.train()
    assert "extra" not in layer._parameters
    assert not layer.training
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.MultiheadAttention, but is Linear"):
        Ours.from_torch(nn.Linear(2, 2))


LAYERS = {
    "MultiheadAttention": lambda: Ours(E, H, add_bias_kv=True),
    "SelfAttention": lambda: tfkern.nn.SelfAttention(E, H, is_causal=True),
    "TransformerEncoderLayer": lambda: tfkern.nn.TransformerEncoderLayer(E, H, 8, dropout=0.0),
    "TransformerEncoder": lambda: tfkern.nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 8, dropout=0.0, batch_first=True), 1),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", LAYERS)
def test_deepcopy_and_pickle(name):
    layer = LAYERS[name]()
    x = torch.randn(N, L, E)
    arguments = (x, x, x, None, False) if name == "MultiheadAttention" else (x,)

    def out(layer):
        y = layer(*arguments)
        return y[0] if isinstance(y, tuple) else y

    want = out(layer)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert type(other) is type(layer)
        assert torch.equal(out(other), want)
        assert all(a is not b for a, b in zip(other.parameters(), layer.parameters(), strict=True))


def test_inference():
    """Where PyTorch takes its fused path."""
    layer = Theirs(E, H, batch_first=True).eval()
    x = torch.randn(N, L, E)
    pad = torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.inference_mode():
        for more in ({}, dict(key_padding_mask=pad), dict(attn_mask=torch.ones(L, L, dtype=torch.bool).triu(1))):
            for weights in (False, True):
                want = layer(x, x, x, need_weights=weights, **more)
                found = Ours.from_torch(layer)(x, x, x, need_weights=weights, **more)
                for a, b in zip(found, want, strict=True):
                    torch.testing.assert_close(a, b)


def test_queries_that_see_no_key():
    layer = Theirs(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    pad = torch.tensor([[False] * 4, [True] * 4])
    for mask in (pad, torch.zeros(N, L).masked_fill(pad, -torch.inf)):
        found = results(Ours.from_torch(layer), dict(query=x, key=x, value=x, key_padding_mask=mask, need_weights=False))
        want = results(layer, dict(query=x, key=x, value=x, key_padding_mask=mask, need_weights=False))
        assert torch.equal(found["out"][1], layer.out_proj.bias.expand(L, E))
        for name in want:
            torch.testing.assert_close(found[name], want[name], msg=lambda m, n=name: f"{n}: {m}")


def test_dropout():
    layer = Ours(E, H, dropout=0.4, batch_first=True)
    x = torch.randn(N, L, E)

    def draw(seed):
        torch.manual_seed(seed)
        return layer(x, x, x, need_weights=False)[0].detach()

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    draws = torch.stack([draw(seed) for seed in range(1000)]).double()
    layer.eval()
    deviation = (draws.mean(0) - draw(0)) / (draws.std(0) / len(draws) ** 0.5)
    assert deviation.abs().max() < 4.5
    layer.train().dropout = 0.0
    assert torch.equal(draw(0), layer.eval()(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("options", [{}, dict(add_bias_kv=True), dict(add_zero_attn=True, kdim=E + 1, vdim=E)], ids=str)
def test_autocast(options):
    layer = Theirs(E, H, **options)
    q, k, v = torch.randn(L, N, E), torch.randn(S, N, options.get("kdim", E)), torch.randn(S, N, E)
    mask = torch.randn(L, S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, found = (m(q, k, v, attn_mask=mask, need_weights=False)[0] for m in (layer, Ours.from_torch(layer)))
        for m in (layer, Ours.from_torch(layer)):
            with pytest.raises(RuntimeError):
                m(q, k, v, attn_mask=mask.double(), need_weights=False)
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_nested_tensors_are_pytorchs():
    """They work on its fused inference path, and raise elsewhere."""
    layer = Theirs(E, H, batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 5)])
    with torch.no_grad():
        want, found = (m(x, x, x, need_weights=False)[0] for m in (layer, Ours.from_torch(layer)))
        for a, b in zip(found.unbind(), want.unbind(), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(AssertionError):
        Ours.from_torch(layer.train())(x, x, x, need_weights=False)


def x_(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


Q, K = x_(L, N, E), x_(S, N, E)
ERRORS = {
    "no heads' divisor": lambda M: M(5, 2),
    "no width": lambda M: M(0, 2),
    "one dim": lambda M: M(E, H)(x_(E), x_(E), x_(E), need_weights=False),
    "four dims": lambda M: M(E, H)(x_(1, L, N, E), x_(1, L, N, E), x_(1, L, N, E), need_weights=False),
    "key unbatched": lambda M: M(E, H)(Q, K[:, 0], K[:, 0], need_weights=False),
    "value batched": lambda M: M(E, H)(Q[:, 0], K[:, 0], K, need_weights=False),
    "width of query": lambda M: M(E, H)(x_(L, N, E + 2), K, K, need_weights=False),
    "width of key": lambda M: M(E, H)(Q, x_(S, N, E + 2), x_(S, N, E + 2), need_weights=False),
    "width of key with kdim": lambda M: M(E, H, kdim=3, vdim=5)(Q, x_(S, N, 4), x_(S, N, 5), need_weights=False),
    "value's length": lambda M: M(E, H)(Q, K, x_(S + 1, N, E), need_weights=False),
    "value's length with vdim": lambda M: M(E, H, vdim=5)(Q, K, x_(S + 1, N, 5), need_weights=False),
    "batches": lambda M: M(E, H)(Q, x_(S, N + 1, E), x_(S, N + 1, E), need_weights=False),
    "dtype of query": lambda M: M(E, H)(Q.double(), K, K, need_weights=False),
    "dtype of layer": lambda M: M(E, H, dtype=torch.float64)(Q, K, K, need_weights=False),
    "integers": lambda M: M(E, H)(Q.long(), K.long(), K.long(), need_weights=False),
    "padding of integers": lambda M: M(E, H)(Q, K, K, x_(N, S).int(), need_weights=False),
    "padding's dims": lambda M: M(E, H)(Q, K, K, x_(S), need_weights=False),
    "padding's dims, unbatched": lambda M: M(E, H)(Q[:, 0], K[:, 0], K[:, 0], x_(N, S), need_weights=False),
    "padding's batch": lambda M: M(E, H)(Q, K, K, x_(N + 1, S), need_weights=False),
    "padding's length": lambda M: M(E, H)(Q, K, K, x_(N, S + 1), need_weights=False),
    "mask of integers": lambda M: M(E, H)(Q, K, K, attn_mask=x_(L, S).int(), need_weights=False),
    "mask's dims": lambda M: M(E, H)(Q, K, K, attn_mask=x_(S), need_weights=False),
    "mask of four dims": lambda M: M(E, H)(Q, K, K, attn_mask=x_(N, H, L, S), need_weights=False),
    "mask's shape": lambda M: M(E, H)(Q, K, K, attn_mask=x_(L, S + 1), need_weights=False),
    "mask's heads": lambda M: M(E, H)(Q, K, K, attn_mask=x_(N, L, S), need_weights=False),
    "mask's heads, unbatched": lambda M: M(E, H)(Q[:, 0], K[:, 0], K[:, 0], attn_mask=x_(3, L, S), need_weights=False),
    "mask of another float": lambda M: M(E, H)(Q, K, K, attn_mask=x_(L, S).double(), need_weights=False),
    "causal without mask": lambda M: M(E, H)(Q, K, K, is_causal=True, need_weights=False),
    "causal without mask, weights": lambda M: M(E, H)(Q, K, K, is_causal=True),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_of_the_same_type(name):
    pytorch_samples.assert_same_type_of_error(ERRORS[name], Ours, Theirs)
