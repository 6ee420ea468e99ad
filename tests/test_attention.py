"""Every case by every backend in every dtype, forward and backward, against the float64 oracle."""

import itertools

import pytest
import torch

import tfkern
from tfkern import configs, eager_tiles, reference, testing

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


ALL_CASES = (*testing.CASES, *testing.FEATURE_CASES)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def named(name: str) -> testing.Case:
    return next(case for case in ALL_CASES if case.name == name)


def assert_within_budget(errors):
    assert all(e.ok for e in errors), "\n" + "\n".join(map(str, errors))


# The interpreter is slow: `make test` takes each case through the kernels in one dtype. Float16 has the cases where its range or
# its rounding could matter, the other two take turns.
IN_FLOAT16 = {"vit-197", "causal", "d80", "d256", "gqa-everything", "large-logits", "layout-packed", "bias", "bias-of-heads",
              "dropout-bias", "packed-bias-dropout", "large-fp16", "large-fp16-softcap", "everything", "everything-packed"}  # fmt: skip


def every_way() -> list:
    """(case, backend, dtype), all of them."""
    ways = []
    for number, case in enumerate(ALL_CASES):
        quick = "fp16" if case.name in IN_FLOAT16 else ("bf16", "fp32")[number % 2]
        for backend, dtype in itertools.product(("portable", "eager", "cpu"), DTYPES):
            marks = [] if backend != "portable" or dtype == quick else [pytest.mark.slow]
            ways.append(pytest.param(case, backend, dtype, id=f"{case}-{backend}-{dtype}", marks=marks))
    return ways


@pytest.mark.parametrize(("case", "backend", "dtype"), every_way())
def test_case(case, backend, dtype, device):
    assert_within_budget(testing.check(case, DTYPES[dtype], backend, device))


@pytest.mark.parametrize(
    "name",
    ["gqa-everything", "padded-window", *map(slow, ("window-lower-right", "full", "everything", "everything-packed"))],
)
@pytest.mark.parametrize("tiles", [(16, 64), (64, 16), (32, 128)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_any_tiles(name, tiles, device):
    """The result does not hang on one choice of tiles: edges fall elsewhere with each."""
    case = named(name)
    with configs.override(**dict.fromkeys(configs.KERNELS, configs.TileConfig(*tiles))):
        assert_within_budget(testing.check(case, torch.float32, "portable", device))


@pytest.mark.parametrize(
    ("backend", "name"),
    [("eager", "gqa-everything"), ("eager", "everything"), ("eager", "everything-packed"), ("portable", "packed-slopes"),
     slow("portable", "everything-packed"), slow("portable", "everything"), slow("portable", "gqa-everything")],
)  # fmt: skip
def test_same_inputs_same_bits(backend, name, device):
    case = named(name)
    inputs = testing.make_inputs(case, torch.bfloat16, device)
    function = tfkern.attention_varlen if case.lengths else tfkern.attention
    first, *others = (testing.results(function, inputs, backend=backend) for _ in range(6 if device == "cuda" else 3))
    for again in others:
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("elements", [1, 700, eager_tiles.CACHED])
@pytest.mark.parametrize("case", [case for case in ALL_CASES if case.score_mod is None], ids=str)
def test_eager_is_exact_in_float64(case, elements, monkeypatch):
    """But for a score_mod, whose constants Triton has in float32."""
    monkeypatch.setattr(eager_tiles, "CACHED", elements)
    inputs = testing.make_inputs(case, torch.float64)
    found = testing.results(tfkern.attention_varlen if case.lengths else tfkern.attention, inputs, backend="eager")
    truth = testing.truth(case, inputs)
    for name in found:
        exact = (
            1e-12 * case.magnitude**2 if found[name].dtype == torch.float64 else 1e-6
        )  # biases, slopes and sinks are float32
        torch.testing.assert_close(found[name].double(), truth[name], rtol=exact, atol=exact)


@pytest.mark.parametrize("kind", ["every second", "expanded", "int32"])
@pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
def test_key_lengths_of_any_stride_and_dtype(backend, kind, device):
    q, k, v = (torch.randn(4, 1, 40, 16, device=device) for _ in range(3))
    lengths = {
        "every second": torch.tensor([40, 0, 7, 0, 1, 0, 33, 0])[::2],
        "expanded": torch.tensor([7]).expand(4),
        "int32": torch.tensor([40, 7, 1, 33], dtype=torch.int32),
    }[kind].to(device)
    found = tfkern.attention(q, k, v, key_lengths=lengths, backend=backend)
    torch.testing.assert_close(found, reference.attention(q, k, v, key_lengths=lengths), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
def test_lazily_negated_inputs(backend, device):
    """x.conj().imag is a view that says "the negative of my memory"."""
    q, k, v = (torch.randn(1, 2, 20, 16, dtype=torch.complex64, device=device).conj().imag for _ in range(3))
    assert q.is_neg()
    found = tfkern.attention(q, k, v, backend=backend)
    torch.testing.assert_close(found, reference.attention(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(window=(2, 1), scale=-0.4)], ids=str)
@pytest.mark.parametrize("n", [(4, 4), (3, 6)], ids=str)
def test_gradcheck(options, n):
    shapes = (1, 2, n[0], 3), (1, 2, n[1], 3), (1, 2, n[1], 3)
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)

    def function(q, k, v):
        return tfkern.attention(q, k, v, return_lse=True, **options)

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_gradcheck_of_the_kernels_in_float32(device):
    """Numerical derivatives in float32 are coarse; a wrong term or sign is far coarser."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 3, generator=generator).to(device).requires_grad_() for _ in range(3))

    def function(q, k, v):
        return tfkern.attention(q, k, v, is_causal=True, return_lse=True, backend="portable")

    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(function, (q, k, v), eps=1e-2, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_kernel_lse_is_float32_exact_for_16_bit_inputs(dtype, device):
    """Stricter than the budget, which goes by what PyTorch makes of lse in the inputs' dtype."""
    inputs = testing.make_inputs(named("gqa-everything"), DTYPES[dtype], device)
    found = testing.results(tfkern.attention, inputs, backend="portable")["lse"]
    truth, plain = (testing.results(reference.attention, inputs.cast(d))["lse"] for d in (torch.float64, torch.float32))
    assert_within_budget([testing.compare("lse", found, truth, [plain])])


def test_oracle_against_pytorch():
    """The oracle itself against an independent one: PyTorch's attention in float64."""
    q, k, v = (torch.randn(2, 3, 33, 8, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
        torch.testing.assert_close(reference.attention(q, k, v, is_causal=causal, scale=0.3), want)
