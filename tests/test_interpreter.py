"""What we mend in Triton's interpreter: bfloat16 conversions round as PyTorch's and dots are right; no address beside a
kernel's tensors is followed."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from tfkern import interpreter

pytestmark = pytest.mark.cpu  # on a GPU kernels are not interpreted


@triton.jit
def _narrow_and_widen(X, NARROW, WIDE, N: tl.constexpr):
    i = tl.arange(0, N)
    narrow = tl.load(X + i).to(tl.bfloat16)
    tl.store(NARROW + i, narrow)
    tl.store(WIDE + i, narrow.to(tl.float32))


@triton.jit
def _dot(A, B, OUT, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(OUT + at, tl.dot(tl.load(A + at), tl.load(B + at)))


def test_conversions_round_to_nearest_even():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-38, 38, (4096,), generator=generator)
    ties = torch.tensor(
        [1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40]
    )
    x[: len(ties)] = ties
    narrow, wide = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096)
    interpreter.run(_narrow_and_widen, 1, (x, narrow, wide, 4096), {})
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_dot():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    interpreter.run(_dot, 1, (a, b, out, 32), {})
    torch.testing.assert_close(out, a.float() @ b.float())


@triton.jit
def _copy(X, OUT, n_read, n_write, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(OUT + i, tl.load(X + i, mask=i < n_read, other=0.0), mask=i < n_write)


@pytest.mark.parametrize(("n_read", "n_write", "wrong"), [(8, 8, None), (0, 0, None), (9, 8, "read"), (8, 9, "write")])
def test_addresses_beside_the_tensors_raise(n_read, n_write, wrong):
    """Even where the storage goes on: what a view does not show is not the kernel's."""
    x, out = torch.arange(16.0)[2:10], torch.zeros(16)[:8]
    if wrong is None:
        interpreter.run(_copy, 1, (x, out, n_read, n_write, 16), {})
        assert torch.equal(out[:n_write], x[:n_write])
    else:
        with pytest.raises(triton.runtime.errors.InterpreterError, match=f"{wrong} bytes .*0, 36.* of a tensor that has 32"):
            interpreter.run(_copy, 1, (x, out, n_read, n_write, 16), {})
        assert not out.any()


class Pair(NamedTuple):
    number: float
    more: tuple


@triton.jit
def _numbers(OUT, number, pair):
    tl.store(OUT, number)
    tl.store(OUT + 1, pair.number)
    tl.store(OUT + 2, pair.more[0])


def test_numbers_are_float32_as_on_a_gpu():
    """However deep in tuples: in float32 there is no 1e300."""
    out = torch.zeros(3, dtype=torch.float64)
    interpreter.run(_numbers, 1, (out, 1e300, Pair(1e300, (1e300,))), {})
    assert out.isposinf().all()


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _four_times(X, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(X + i, _twice(_twice(tl.load(X + i))))


def test_the_language_is_patched_once_a_launch_and_restored(monkeypatch):
    """Not at each call of a device function, which takes most of the time."""
    patched, original = [], triton.runtime.interpreter._patch_builtin
    monkeypatch.setattr(
        triton.runtime.interpreter, "_patch_builtin", lambda place, *rest: (patched.append(place), original(place, *rest))
    )
    before = tl.load, tl.range, tl.math.exp, tl.tensor.__add__
    x = torch.arange(16.0)
    interpreter.run(_four_times, 2, (x, 16), {})
    assert torch.equal(x, 16 * torch.arange(16.0))
    assert patched.count(tl) == 1
    assert (tl.load, tl.range, tl.math.exp, tl.tensor.__add__) == before
    with pytest.raises(triton.runtime.errors.InterpreterError):
        interpreter.run(_four_times, 1, (x, 32), {})
    assert (tl.load, tl.range, tl.math.exp, tl.tensor.__add__) == before
