"""scaled_dot_product_attention against PyTorch's own: its OpInfo samples, what those never draw, its errors.

Results are judged as everywhere (tfkern/testing/budget.py). The oracle folds all dims before the heads by writing the broadcasts
out, and is itself held against PyTorch's function in float64 wherever there is no dropout.
"""

import functools
import inspect
import itertools
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import tfkern
from tfkern import reference
from tfkern.testing import budget

sys.path.append(str(Path(__file__).resolve().parent))
import pytorch_samples

ours = tfkern.scaled_dot_product_attention
theirs = F.scaled_dot_product_attention
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NAMES = ("query", "key", "value", "attn_mask")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def oracle(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, naive=reference.attention, **options):
    """PyTorch's contract in four dimensions, every broadcast written out."""
    if options.pop("enable_gqa", False):
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))

    def fold(x: Tensor) -> Tensor:
        x = x.expand(*batch, *x.shape[-2:])
        return x.reshape(math.prod(batch[:-1]), batch[-1] if batch else 1, *x.shape[-2:])

    if hasattr(attn_mask, "variant"):
        options["causal_alignment"] = "upper_left" if attn_mask.variant.name == "UPPER_LEFT" else "lower_right"
        attn_mask, is_causal = None, True
    if attn_mask is not None:
        attn_mask = fold(attn_mask.expand(*batch, query.shape[-2], key.shape[-2]))
    out = naive(fold(query), fold(key), fold(value), attn_mask, dropout_p, is_causal, **options)
    return out.reshape(*batch, *out.shape[-2:])


def flash(dtype):
    """The oracle with the backward of flash attention written out."""
    return lambda *args, **options: oracle(*args, naive=lambda *a, **o: reference.flash(*a, out_dtype=dtype, **o), **options)


def results(function, tensors: dict, options: dict, do: Tensor | None = None) -> dict[str, Tensor]:
    """out and the gradients of (out . do) by every floating-point tensor. Each call draws the same random bits."""
    tensors = {n: x.detach().to(DEVICE) for n, x in tensors.items()}
    leaves = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in tensors.items()}
    differentiable = [n for n, x in leaves.items() if x.requires_grad]
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        out = function(**leaves, **options)
    if do is None:
        do = torch.randn(out.shape, generator=torch.Generator().manual_seed(4321)).to(out.dtype)
    grads = torch.autograd.grad(out, [leaves[n] for n in differentiable], do.to(out))
    return {"out": out, **{f"d{n}": g for n, g in zip(differentiable, grads, strict=True)}}


def cast(tensors: dict, dtype: torch.dtype) -> dict:
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}


def plain_results(tensors: dict, options: dict, dtype: torch.dtype, do: Tensor) -> list[dict]:
    forms = [results(oracle, cast(tensors, dtype), options, do)]
    return [*forms, results(flash(dtype), cast(tensors, torch.float32), options, do)]


def check(draw, dtype: torch.dtype) -> None:
    """draw(seed) gives tensors by name, and options. What PyTorch computes, and within the house's budget."""
    tensors, options = draw(0)
    found = results(ours, tensors, options)
    do = torch.randn(found["out"].shape, generator=torch.Generator().manual_seed(4321)).to(dtype)
    truth = results(oracle, cast(tensors, torch.float64), options, do)
    if not options.get("dropout_p"):
        with sdpa_kernel(SDPBackend.MATH):
            for name, x in results(theirs, cast(tensors, torch.float64), options, do).items():
                torch.testing.assert_close(truth[name], x, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"the oracle's {n}: {m}")
    for name, x in found.items():
        assert x.dtype == (dtype if name != "dattn_mask" else tensors["attn_mask"].dtype)
    if dtype == torch.float64:  # the oracle's own precision
        for name, x in found.items():
            near = max(1e-11, torch.finfo(x.dtype).eps)  # a mask of float32 has such a gradient
            torch.testing.assert_close(x.double(), truth[name], rtol=near, atol=near, msg=lambda m, n=name: f"{n}: {m}")
        return
    plain = plain_results(tensors, options, dtype, do)
    errors = budget.judge(found, truth, plain, lambda: results(flash(dtype), cast(tensors, torch.float64), options, do))
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


@functools.cache
def opinfo():
    """PyTorch's description of the function, for its own tests."""
    database = pytorch_samples.load("common_methods_invocations").op_db
    return next(op for op in database if op.name == "nn.functional.scaled_dot_product_attention")


def opinfo_samples(dtype: torch.dtype, factor: float, seed: int) -> list[tuple[dict, dict]]:
    torch.manual_seed(seed)
    samples = []
    for sample in opinfo().sample_inputs("cpu", dtype, requires_grad=False):
        given = dict(zip(NAMES, (sample.input, *sample.args), strict=False)) | sample.kwargs
        tensors = {n: x * factor for n, x in given.items() if isinstance(x, Tensor)}
        samples.append((tensors, {n: x for n, x in given.items() if not isinstance(x, Tensor)}))
    return samples


@pytest.mark.parametrize("factor", [1.0, 0.125], ids=["raw", "eighth"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opinfo(dtype, factor):
    """All of PyTorch's own samples, as they are (their softmax is saturated) and scaled down."""
    draws: dict[int, list] = {}

    def draw(index, seed):
        if seed not in draws:
            draws[seed] = opinfo_samples(dtype, factor, seed)
        return draws[seed][index]

    assert set(DTYPES) == opinfo().supported_dtypes("cpu")
    count = len(opinfo_samples(dtype, factor, 0))
    assert count >= 25
    for index in range(count):
        check(lambda seed, index=index: draw(index, seed), dtype)
    print(f"{count} OpInfo samples, {dtype}, times {factor}: forward and gradients")


def drawn(shapes, mask=None, mask_dtype=None, **options):
    """A draw of tensors of three shapes and a mask's. A mask of bools or of -inf kills its first row."""

    def draw(dtype: torch.dtype):
        def of_seed(seed: int):
            generator = torch.Generator().manual_seed(seed)
            tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in zip(NAMES, shapes, strict=False)}
            if mask is not None:
                x = torch.randn(mask, generator=generator)
                boolean = mask_dtype == torch.bool
                x = x < 1.0 if boolean else x.masked_fill(x > 1.0, -math.inf).to(mask_dtype or dtype)
                if x.dim() > 1 and x.shape[-2] > 1:
                    x[..., 0, :] = False if boolean else -math.inf
                tensors["attn_mask"] = x
            return tensors, options

        return of_seed

    return draw


def mask_grid():
    """Every mask that broadcasts, of every number of dims, bool and float, over inputs of 2 to 5 dims."""
    for dims in range(2, 6):
        batch = (2, 3, 2)[: dims - 2]
        full = (*batch, 5, 7)
        for kept in itertools.product([True, False], repeat=dims):
            mask = tuple(n if k else 1 for n, k in zip(full, kept, strict=True))
            yield batch, mask
        yield from ((batch, full[-n:]) for n in range(dims))


@pytest.mark.parametrize("mask_dtype", [torch.bool, None, torch.float32], ids=["bool", "own", "float32"])
def test_masks_of_every_broadcast(mask_dtype):
    count = 0
    for batch, mask in mask_grid():
        dtype = torch.float32 if count % 2 or mask_dtype is None else torch.bfloat16
        case = drawn([(*batch, 5, 4), (*batch, 7, 4), (*batch, 7, 4)], mask or (), mask_dtype)
        check(case(dtype), dtype)
        count += 1
    print(f"{count} broadcasts of {mask_dtype or 'own'} masks: forward and gradients")


S, L, E = 7, 5, 8
GRID = {
    "two dims": drawn([(L, E), (S, E), (S, E)]),
    "two dims, causal": drawn([(L, E), (S, E), (S, E)], is_causal=True),
    "three dims": drawn([(3, L, E), (3, S, E), (3, S, E)], scale=0.7),
    "five dims": drawn([(2, 3, 4, L, E), (2, 3, 4, S, E), (2, 3, 4, S, E)], is_causal=True),
    "six dims": drawn([(2, 1, 3, 2, L, E), (2, 1, 3, 2, S, E), (2, 1, 3, 2, S, E)]),
    "batch of one in keys": drawn([(2, 4, L, E), (1, 4, S, E), (1, 4, S, E)]),
    "one head in keys": drawn([(2, 4, L, E), (2, 1, S, E), (2, 1, S, E)]),
    "one head in keys, not in values": drawn([(2, 4, L, E), (2, 1, S, E), (2, 4, S, E)]),
    "one head in values": drawn([(2, 4, L, E), (2, 4, S, E), (2, 1, S, E)]),
    "one head in queries": drawn([(2, 1, L, E), (2, 4, S, E), (2, 4, S, E)]),
    "queries of two dims": drawn([(L, E), (2, 4, S, E), (2, 4, S, E)]),
    "keys of two dims": drawn([(2, 4, L, E), (S, E), (S, E)]),
    "keys and values of different batches": drawn([(1, 4, L, E), (1, 4, S, E), (3, 4, S, E)]),
    "some of five dims broadcast": drawn([(2, 1, 4, L, E), (1, 3, 4, S, E), (3, 1, S, E)]),
    "Ev larger": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, 20)]),
    "Ev smaller": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, 3)], is_causal=True),
    "grouped": drawn([(2, 6, L, E), (2, 2, S, E), (2, 2, S, E)], enable_gqa=True),
    "grouped, causal, Ev": drawn([(2, 6, L, E), (2, 3, S, E), (2, 3, S, 5)], is_causal=True, enable_gqa=True),
    "grouped differently in keys and values": drawn([(2, 6, L, E), (2, 2, S, E), (2, 3, S, E)], enable_gqa=True),
    "grouped, equal": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], enable_gqa=True),
    "grouped, three dims": drawn([(6, L, E), (2, S, E), (2, S, E)], enable_gqa=True),
    "grouped, five dims": drawn([(2, 3, 4, L, E), (2, 3, 2, S, E), (2, 3, 2, S, E)], enable_gqa=True),
    "grouped, batch of one in keys": drawn([(2, 4, L, E), (1, 2, S, E), (1, 2, S, E)], enable_gqa=True),
    "grouped, mask": drawn([(2, 4, L, E), (2, 2, S, E), (2, 2, S, E)], (2, 1, L, S), torch.bool, enable_gqa=True),
    "scale": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], scale=2.0, is_causal=True),
    "scale of 0": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], scale=0),
    "negative scale": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], (L, S), torch.bool, scale=-0.5),
    "dead rows, bool": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], (2, 3, L, S), torch.bool),
    "dead rows, -inf": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], (2, 1, L, S)),
    "dead rows, -inf, three dims, float32": drawn([(3, L, E), (3, S, E), (3, S, E)], (L, S), torch.float32),
    "five dims, mask of four": drawn([(2, 3, 4, L, E), (2, 3, 4, S, E), (2, 3, 4, S, E)], (3, 1, L, S)),
    "causal bias, upper left": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], attn_mask=causal_upper_left(L, S)),
    "causal bias, lower right": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], attn_mask=causal_lower_right(L, S)),
    "causal bias, lower right, three dims": drawn([(3, L, E), (3, S, E), (3, S, E)], attn_mask=causal_lower_right(L, S), scale=0.3),
    "causal bias, grouped": drawn([(2, 4, L, E), (2, 2, S, E), (2, 2, S, E)], attn_mask=causal_lower_right(L, S), enable_gqa=True),
    "more queries than keys": drawn([(2, 3, S, E), (2, 3, L, E), (2, 3, L, E)], is_causal=True),
    "dropout": drawn([(2, 2, 3, L, E), (2, 2, 3, S, E), (2, 2, 3, S, E)], (3, 1, S), dropout_p=0.3),
    "dropout of everything": drawn([(2, 3, L, E), (2, 3, S, E), (2, 3, S, E)], dropout_p=1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", GRID)
def test_what_opinfo_never_draws(name):
    for dtype in DTYPES:
        check(GRID[name](dtype), dtype)


@pytest.mark.parametrize(
    "name", ["grouped differently in keys and values", "some of five dims broadcast", "causal bias, grouped", "dropout"]
)
def test_in_the_kernels(name, monkeypatch):
    monkeypatch.setenv("TFKERN_BACKENDS", "portable")
    check(GRID[name](torch.float32), torch.float32)


EMPTY = {
    "no queries": ((2, 3, 0, E), (2, 3, S, E), (2, 3, S, E)),
    "no keys": ((2, 3, L, E), (2, 3, 0, E), (2, 3, 0, E)),
    "no keys, three dims": ((3, L, E), (3, 0, E), (3, 0, E)),
    "no batch": ((0, 3, L, E), (0, 3, S, E), (0, 3, S, E)),
    "no batch, one in keys": ((0, 3, L, E), (1, 3, S, E), (1, 3, S, E)),
    "no heads": ((2, 0, L, E), (2, 0, S, E), (2, 0, S, E)),
    "no heads, one in keys": ((2, 0, L, E), (2, 1, S, E), (2, 1, S, E)),
    "no head dim": ((2, 3, L, 0), (2, 3, S, 0), (2, 3, S, E)),
    "no value dim": ((2, 3, L, E), (2, 3, S, E), (2, 3, S, 0)),
}


SINCE_2_12 = pytest.mark.needs("PyTorch 2.12", torch.__version__ >= "2.12")  # 2.11's own crashes the process without heads


@pytest.mark.parametrize("name", [pytest.param(name, marks=[SINCE_2_12] * (name == "no heads")) for name in EMPTY])
@pytest.mark.parametrize("options", [{}, dict(is_causal=True), "mask"], ids=str)
def test_empty(name, options):
    shapes = EMPTY[name]
    mask = dict(attn_mask=torch.ones(shapes[0][-2], shapes[1][-2], dtype=torch.bool)) if options == "mask" else options
    tensors = [torch.randn(s, requires_grad=True) for s in shapes]
    out, want = ours(*tensors, **mask), theirs(*tensors, **mask)
    assert out.shape == want.shape
    torch.testing.assert_close(out, want)
    for x, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert grad.shape == x.shape
        assert grad.isfinite().all()


def random_call(rng: random.Random) -> tuple[list[Tensor], dict]:
    """Shapes and options that may or may not fit, none of them empty."""
    full = [rng.choice([1, 2, 3, 4]) for _ in range(rng.choice([0, 1, 2, 2, 3]))]

    def batch() -> list[int]:
        some = [n if rng.random() < 0.75 else rng.choice([1, 2]) for n in full]
        return some[rng.choice([0, 0, 0, 1, 2]) :]

    n_q, n_k, dim = rng.choice([1, 3, 5]), rng.choice([1, 4]), rng.choice([1, 4])
    own = batch()  # of key and value both: else a mask could broadcast along value's alone, which is refused there
    shapes = [(*batch(), n_q, dim), (*own, n_k, dim), (*own, n_k, rng.choice([dim, 3]))]
    options = {}
    if rng.random() < 0.3:
        options["is_causal"] = True
    elif rng.random() < 0.6:
        mask = [n if rng.random() < 0.7 else 1 for n in (*full, n_q, n_k)]
        mask = torch.randn(mask[rng.randint(0, len(mask) - 2) :])
        options["attn_mask"] = mask > 0 if rng.random() < 0.5 else mask
    if rng.random() < 0.25:
        options["enable_gqa"] = True
    if rng.random() < 0.2:
        options["scale"] = rng.choice([0, 0.5, -1.0])
    return [torch.randn(shape) for shape in shapes], options


def test_random_shapes():
    """What PyTorch computes we compute, what it refuses we refuse by the same type of error."""
    rng, computed, refused = random.Random(0), 0, 0
    torch.manual_seed(0)
    for _ in range(500):
        tensors, options = random_call(rng)
        about = [tuple(x.shape) for x in tensors], options
        with sdpa_kernel(SDPBackend.MATH):
            try:
                want = theirs(*tensors, **options)
            except (RuntimeError, IndexError) as error:
                want = type(error)
        if isinstance(want, type):
            with pytest.raises(want) as found:
                ours(*tensors, **options)
            assert found.type is want, about
            refused += 1
        else:
            torch.testing.assert_close(ours(*tensors, **options), want, msg=lambda m, about=about: f"{about}: {m}")
            computed += 1
    print(f"{computed} random calls computed alike, {refused} refused alike")
    assert min(computed, refused) > 100


def z(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


Q, K = z(2, 4, 3, 8), z(2, 4, 6, 8)
ERRORS = {
    "one dim": lambda f: f(z(8), z(8), z(8)),
    "batches": lambda f: f(Q, z(3, 4, 6, 8), z(3, 4, 6, 8)),
    "heads": lambda f: f(Q, K[:, :2], K[:, :2]),
    "value length, two dims": lambda f: f(Q[0, 0], K[0, 0], z(5, 8)),
    "value length, five dims": lambda f: f(Q[None], K[None], z(1, 2, 4, 5, 8)),
    "head dims": lambda f: f(Q, z(2, 4, 6, 9), K),
    "mask of integers": lambda f: f(Q, K, K, z(3, 6).int()),
    "mask of another float": lambda f: f(Q, K, K, z(3, 6).half()),
    "mask of float64": lambda f: f(Q, K, K, z(3, 6).double()),
    "mask shape": lambda f: f(Q, K, K, z(3, 5)),
    "mask shape, three dims": lambda f: f(Q[0], K[0], K[0], z(3, 5)),
    "mask of five dims": lambda f: f(Q, K, K, z(1, 2, 4, 3, 6)),
    "mask of five dims, of one": lambda f: f(Q, K, K, z(1, 1, 1, 1, 6)),
    "mask enlarges the batch": lambda f: f(Q[:1], K[:1], K[:1], z(2, 4, 3, 6)),
    "mask enlarges the heads": lambda f: f(Q[:, :1], K[:, :1], K[:, :1], z(1, 4, 3, 6)),
    "mask enlarges the queries": lambda f: f(Q[:, :, :1], K, K, z(3, 6)),
    "mask enlarges the keys": lambda f: f(Q, K[:, :, :1], K[:, :, :1], z(3, 6)),
    "mask enlarges three dims": lambda f: f(Q[0], K[0], K[0], z(2, 4, 3, 6)),
    "mask is a list": lambda f: f(Q, K, K, [1.0]),
    "query is a list": lambda f: f([1.0], K, K),
    "query is None": lambda f: f(None, K, K),
    "integers": lambda f: f(Q.int(), K.int(), K.int()),
    "integers, three dims": lambda f: f(Q[0].long(), K[0].long(), K[0].long()),
    "bools": lambda f: f(Q.bool(), K.bool(), K.bool()),
    "complex": lambda f: f(Q.cfloat(), K.cfloat(), K.cfloat()),
    "float8": lambda f: f(*(x.to(torch.float8_e4m3fn) for x in (Q, K, K))),
    "mixed dtypes": lambda f: f(Q, K.half(), K.half()),
    "mixed dtypes of value": lambda f: f(Q, K, K.double()),
    "devices": lambda f: f(Q.to("meta"), K, K),
    "dropout above 1": lambda f: f(Q, K, K, None, 1.5),
    "dropout below 0": lambda f: f(Q, K, K, None, -0.1),
    "dropout NaN": lambda f: f(Q, K, K, None, math.nan),
    "dropout None": lambda f: f(Q, K, K, None, None),
    "dropout text": lambda f: f(Q, K, K, None, "a"),
    "scale with grad": lambda f: f(Q, K, K, scale=torch.tensor(0.5, requires_grad=True)),
    "scale of one dim": lambda f: f(Q, K, K, scale=torch.tensor([0.5])),
    "scale text": lambda f: f(Q, K, K, scale="a"),
    "scale complex": lambda f: f(Q, K, K, scale=1j),
    "scale by position": lambda f: f(Q, K, K, None, 0.0, False, 0.5),
    "causal 1": lambda f: f(Q, K, K, is_causal=1),
    "causal None": lambda f: f(Q, K, K, is_causal=None),
    "grouped 1": lambda f: f(Q, K, K, enable_gqa=1),
    "grouped, not a divisor": lambda f: f(Q, K[:, :3], K[:, :3], enable_gqa=True),
    "grouped, more keys": lambda f: f(Q[:, :2], K, K, enable_gqa=True),
    "grouped, two dims": lambda f: f(Q[0, 0], K[0, 0], K[0, 0], enable_gqa=True),
    "unknown argument": lambda f: f(Q, K, K, foo=1),
    "causal bias and causal": lambda f: f(Q, K, K, causal_lower_right(3, 6), is_causal=True),
    "causal bias of other lengths": lambda f: f(Q, K, K, causal_lower_right(4, 7)),
    "causal bias, mixed dtypes": lambda f: f(Q, K.half(), K.half(), causal_lower_right(3, 6)),
    "causal bias, one dim": lambda f: f(z(8), z(8), z(8), causal_lower_right(3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_of_the_same_type(name):
    pytorch_samples.assert_same_type_of_error(ERRORS[name], ours, theirs)


# What PyTorch's documentation forbids and its fused paths compute, some of it from memory beside the tensors.
FORBIDDEN = {
    "lengths of key and value": (lambda: ours(Q, K, z(2, 4, 7, 8)), RuntimeError, r"value must have the length of key, 6, but has shape \(2, 4, 7, 8\)"),
    "lengths of key and value, three dims": (lambda: ours(Q[0], K[0], z(4, 5, 8)), RuntimeError, r"value must have the length of key, 6, but has shape \(4, 5, 8\)"),
    "mask and causal": (lambda: ours(Q, K, K, z(3, 6), is_causal=True), RuntimeError, "Explicit attn_mask should not be set when is_causal=True"),
    "mask elsewhere": (lambda: ours(Q, K, K, z(3, 6, device="meta")), RuntimeError, "attn_mask must be on the device of query"),
    "scale infinite": (lambda: ours(Q, K, K, scale=math.inf), ValueError, "scale must be finite"),
    "no heads to group": (lambda: ours(Q, K[:, :0], K[:, :0], enable_gqa=True), RuntimeError, "Number of heads in key and value must divide .* 4, .* 0 and 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_the_documentation_forbids(name):
    call, error, message = FORBIDDEN[name]
    with pytest.raises(error, match=message):
        call()


def test_arguments_are_pytorchs():
    parameters = inspect.signature(ours).parameters
    documented = theirs.__doc__.split(") -> ")[0].split("(", 1)[1]
    assert [p.strip().split("=")[0] for p in documented.split(",")] == list(parameters)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_strides_are_pytorchs(order, masked):
    """Of the result and of the gradients."""
    sizes, inverse = (2, 4, 3), [order.index(d) for d in range(3)]
    q, k, v = (torch.randn(*(sizes[d] for d in order), 8).permute(*inverse, 3).requires_grad_() for _ in range(3))
    mask = z(3, 3) if masked else None
    out, want = ours(q, k, v, mask), theirs(q, k, v, mask)
    assert out.stride() == want.stride()
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.stride() == x.stride()


def test_gradcheck():
    """Numerical derivatives, of q, k, v and the mask at once."""
    generator = torch.Generator().manual_seed(0)

    def wide(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    cases = [
        ([wide(2, 3, 4, 3), wide(2, 3, 5, 3), wide(2, 3, 5, 2), wide(4, 5)], {}),
        ([wide(3, 4, 3), wide(2, 3, 5, 3), wide(1, 1, 5, 3), wide(2, 1, 1, 5)], dict(scale=0.5)),
        ([wide(2, 4, 4, 3), wide(2, 2, 5, 3), wide(2, 2, 5, 3)], dict(is_causal=True, enable_gqa=True)),
        ([wide(2, 2, 2, 4, 3), wide(2, 2, 5, 3), wide(2, 1, 5, 3)], dict(attn_mask=causal_lower_right(4, 5))),
        ([wide(4, 3), wide(5, 3), wide(5, 3), wide(1, 5)], {}),
    ]
    for tensors, options in cases:
        assert torch.autograd.gradcheck(lambda *t, options=options: ours(*t, **options), tensors)
        grads = torch.autograd.grad(ours(*tensors, **options).square().sum(), tensors, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(grads[0].sum(), tensors[0])
    print(f"gradcheck of {len(cases)} problems; their second derivatives raise")


def test_transforms():
    """torch.func.grad is right, what isn't built raises."""
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    found = torch.func.grad(lambda q: ours(q, k[:1], v[:1], is_causal=True).square().sum())(q)
    torch.testing.assert_close(found, torch.func.grad(lambda q: oracle(q, k[:1], v[:1], is_causal=True).square().sum())(q))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(ours, (q, k, v), (q, k, v))
    torch.testing.assert_close(torch.vmap(ours)(q, k, v), torch.vmap(oracle)(q, k, v))


def test_gradient_of_the_mask_alone():
    mask = torch.randn(2, 1, 3, 6, requires_grad=True)
    (found,) = torch.autograd.grad(ours(Q + 1, K + K.new_tensor(range(8)), torch.rand_like(K), mask).sum(), mask)
    assert found.shape == mask.shape
    assert found.abs().sum() > 0


def test_masked_nan_does_not_leak():
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 4:] = False
    clean = ours(q, k, v, mask)
    k[:, :, 4:], v[:, :, 4:] = math.nan, math.nan
    k.requires_grad_()
    out = ours(q, k, v, mask)
    assert torch.equal(out, clean)
    assert torch.autograd.grad(out.sum(), k)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Mixed inputs and float masks go to the autocast dtype, float64 does not."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8).to(dtype), torch.randn(2, 4, 6, 8)
    q.requires_grad_()
    mask = torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, want = ours(q, k, v, mask), theirs(q, k, v, mask)
        wide = ours(*(x.double() for x in (q, k, v)))
        with pytest.raises(RuntimeError):
            ours(q.double(), k, v)
        with pytest.raises(RuntimeError):
            ours(q.long(), k.long(), v.long())
    assert (out.dtype, wide.dtype) == (want.dtype, torch.float64)
    assert torch.equal(out, ours(*(x.to(dtype) for x in (q, k, v, mask))))
    grads = torch.autograd.grad(out.float().sum(), (q, mask))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    with pytest.raises(RuntimeError):
        ours(q, k, v)


def test_jagged():
    parts = [torch.randn(n, 4, 8) for n in (5, 1, 7)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    for options, bias in (
        (dict(is_causal=True), {}),
        (dict(scale=0.3), {}),
        (dict(is_causal=True), dict(attn_mask=causal_upper_left(1, 2))),
    ):
        found = ours(nested, nested, nested, **(bias or options)).transpose(1, 2).unbind()
        for x, out in zip((part.transpose(0, 1) for part in parts), found, strict=True):
            torch.testing.assert_close(out.transpose(0, 1), theirs(x, x, x, **options))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_nested_of_the_old_layout():
    nested = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in (5, 1, 7)])
    with pytest.raises(ValueError, match=r"query must be a nested tensor \(B, H, ragged, D\) of layout torch.jagged"):
        ours(nested, nested, nested)


def test_a_causal_bias_of_equal_lengths_is_upper_left():
    """PyTorch looks no further, whatever the lengths of query and key."""
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(ours(q, k, k, causal_lower_right(7, 7)), theirs(q, k, k, causal_lower_right(7, 7)))


def test_scale_as_a_tensor():
    assert torch.equal(ours(Q + 1, K + 1, K + 1, scale=torch.tensor(0.25)), ours(Q + 1, K + 1, K + 1, scale=0.25))
