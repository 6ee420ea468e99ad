"""The error budget: it bounds what a correct implementation may err on any machine, and no more."""

import pytest
import torch
import torch.nn.functional as F

import tfkern
from tfkern import testing
from tfkern.testing import budget
from tfkern.testing.rounding import Rounding

CASES = {case.name: case for case in (*testing.CASES, *testing.FEATURE_CASES)}
SMALL = ["one-key", "one-query", "one-by-one", "causal", "padded", "gqa", "bias", "packed", "sinks", "slopes", "softcap"]
U = torch.finfo(torch.float32).eps / 2


def one_after_the_other(x, dim=-1):
    """A float32 sum in the worst order."""
    total = torch.zeros_like(x.select(dim, 0))
    for part in x.unbind(dim):
        total = total + part
    return total


@pytest.mark.parametrize("terms", [2, 17, 64, 1000])
def test_a_sum_errs_as_in_the_worst_order(terms):
    """Of 4,000 sums the errors are spread as those of the worst order are, and the largest are within the factor of float32."""
    x = torch.randn(4000, terms, generator=torch.Generator().manual_seed(terms))
    exact = x.double().sum(-1)
    worst = one_after_the_other(x).double() - exact
    with Rounding(0):
        drawn = x.double().sum(-1) - exact
    assert worst.std() <= drawn.std() <= 3 * worst.std()
    assert worst.abs().max() <= 3 * drawn.abs().max()


def test_terms_that_cancel_count_by_their_magnitudes():
    big = torch.tensor([[1e8, -1e8, 1.0]], dtype=torch.float64)
    with Rounding(0):
        sums = [(big.sum(-1) - 1).abs().item() for _ in range(50)]
        products = [(big @ torch.ones(3, 1, dtype=torch.float64) - 1).abs().item() for _ in range(50)]
    for found in (sums, products):
        assert U * 1e8 < max(found) <= 2.1 * U * 1e8


def test_softmax_backward_of_one_key():
    """P * (dP - sum(P * dP)), truly 0."""
    x = torch.randn(1000, 1, dtype=torch.float64, requires_grad=True)
    do = torch.randn(1000, 1, dtype=torch.float64)
    with Rounding(0):
        (grad,) = torch.autograd.grad(F.softmax(x, -1), x, do)
    assert 0.5 * U < (grad / do).abs().max() <= 4 * U


def test_what_is_not_rounded():
    """Other types, views, copies, infinities, and the inputs themselves."""
    x = torch.randn(10, 10, dtype=torch.float64)
    kept, narrow = x.clone(), torch.randn(10, 10)
    with Rounding(0):
        assert torch.equal(narrow @ narrow, narrow.mm(narrow))
        assert torch.equal(x.mT.clone(), kept.mT)
        assert (torch.full((3,), -torch.inf, dtype=torch.float64) * 2 == -torch.inf).all()
        assert not torch.equal(x * 3, x * 3)
    assert torch.equal(x, kept)


def test_products_of_a_narrow_type():
    x = torch.randn(64, 64, dtype=torch.float64)
    exact, tripled = x @ x, x * 3
    narrow = (x.bfloat16() @ x.bfloat16()).double() - exact
    with Rounding(0, torch.bfloat16):
        drawn, other = x @ x, x * 3
    assert 0.3 < (drawn - exact).abs().max() / narrow.abs().max() < 3
    assert 0 < (other - tripled).abs().max() <= U * tripled.abs().max()


def test_the_same_on_every_machine():
    """By the seed alone."""
    x = torch.randn(20, 20, dtype=torch.float64)

    def run(seed):
        with Rounding(seed):
            return x @ x

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_where_plain_pytorch_errs_nothing_in_float32(name, dtype):
    """As on a CPU whose sums happen to be exact: what we compute is within what is left of the budget."""
    case = CASES[name]
    inputs = testing.make_inputs(case, dtype)
    function = tfkern.attention_varlen if case.lengths else tfkern.attention
    found, wanted = testing.results(function, inputs, backend="eager"), budget.truth(case, inputs)
    plain = budget.plain(case, inputs)[0] if dtype != torch.float32 else {n: x.float() for n, x in wanted.items()}
    errors = budget.judge(found, wanted, [plain], budget.again(case, inputs))
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("name", ["causal", "gqa", "bias", "sinks", "packed"])
@pytest.mark.parametrize("quantity", ["out", "lse", "dq", "dk", "dv"])
def test_small_faults_exceed_it(name, quantity):
    """One result off by 2e-5 of the largest, in float32."""
    case = CASES[name]
    inputs = testing.make_inputs(case, torch.float32)
    found = {n: x.detach().clone() for n, x in budget.plain(case, inputs)[0].items()}
    assert all(e.ok for e in budget.assess(case, inputs, found))
    x = found[quantity]
    x[x == x[x.isfinite()].max()] *= 1 + 2e-5
    assert [e.quantity for e in budget.assess(case, inputs, found) if not e.ok] == [quantity]
