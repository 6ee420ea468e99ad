"""Checkpointing around tfkern.patch: what is replayed in the backward attends by what its forward attended by, with its bits."""

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointError, CheckpointFunction, checkpoint

import tfkern

Q, K, V, W = torch.randn(4, 2, 3, 12, 8, generator=torch.Generator().manual_seed(0)).double()
NOTHING = contextlib.nullcontext


@contextlib.contextmanager
def for_good():
    tfkern.patch()
    try:
        yield
    finally:
        tfkern.unpatch()


def untouched() -> bool:
    """Whether PyTorch's class is as it was."""
    functions = CheckpointFunction.forward, CheckpointFunction.backward
    return all(f.__code__.co_filename == torch.utils.checkpoint.__file__ for f in functions)


@pytest.fixture(autouse=True)
def undone():
    """Unless another test's fixture keeps a patched model."""
    gc.collect()
    before = untouched()
    yield
    gc.collect()
    assert untouched() or not before


def test_a_patched_model_that_dies():
    layer = nn.MultiheadAttention(8, 2)
    tfkern.patch(layer)
    assert not untouched()


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)


def replayed(f, forward, backward, **options) -> torch.Tensor:
    """f is linear in v: that its result and its gradient have the same bits shows. Returns the result."""
    torch.manual_seed(1)
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    with forward():
        y = checkpoint(f, q, k, v, **options)
    torch.rand(7)
    with backward():
        (y * W).sum().backward()
    torch.testing.assert_close((v * v.grad).sum(), (y * W).sum())
    return y.detach()


@pytest.mark.parametrize("backward", [tfkern.patched, for_good, NOTHING])
@pytest.mark.parametrize("forward", [tfkern.patched, for_good, NOTHING])
def test_the_process(forward, backward):
    y = replayed(attend, forward, backward, use_reentrant=True)
    torch.manual_seed(1)
    with forward():
        assert torch.equal(y, attend(Q, K, V))
    if forward is backward:
        replayed(attend, forward, backward, use_reentrant=False)
        return
    if NOTHING in (forward, backward):
        with pytest.raises(CheckpointError):
            replayed(attend, forward, backward, use_reentrant=False)
        with pytest.raises((IndexError, NotImplementedError, RuntimeError)):
            replayed(attend, forward, backward, use_reentrant=False, determinism_check="none")


def test_blocks_within_each_other():
    """An unpatched part of a patched forward, and a checkpoint within another."""

    def inner(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=True)

    def partly(q, k, v):
        with tfkern.patched():
            return inner(q, k, attend(q, k, v))

    for f in (inner, partly):
        for forward in (tfkern.patched, NOTHING):
            for backward in (tfkern.patched, NOTHING):
                replayed(f, forward, backward, use_reentrant=True)


def layers():
    yield nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
    yield nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)


@pytest.mark.parametrize("index", range(2))
@pytest.mark.parametrize(("forward", "backward"), [(True, False), (False, True), (True, True)])
def test_a_model(index, forward, backward):
    """The gradients are those without checkpointing."""

    def trained(layer, patched_then: bool, patched_later: bool, wrap) -> list:
        def f(x):
            if isinstance(layer, nn.MultiheadAttention):
                return layer(x, x, x, need_weights=False)[0]
            return layer(x)

        for p in layer.parameters():
            p.grad = None
        torch.manual_seed(1)
        x = Q[0, :, :, :].clone().requires_grad_()
        with tfkern.patched(layer) if patched_then else NOTHING():
            y = wrap(f, x)
        torch.rand(7)
        with tfkern.patched(layer) if patched_later else NOTHING():
            y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]

    torch.manual_seed(0)
    layer = list(layers())[index].double()
    wanted = trained(layer, forward, forward, lambda f, x: f(x))
    found = trained(layer, forward, backward, lambda f, x: checkpoint(f, x, use_reentrant=True))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_unpatched_in_between():
    layer = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True).double()
    state = torch.get_rng_state()
    gradients = []
    for between in (lambda: None, lambda: tfkern.unpatch(layer)):
        torch.set_rng_state(state)
        tfkern.patch(layer)
        x = Q[0].clone().requires_grad_()
        y = checkpoint(lambda x: layer(x, x, x, need_weights=False)[0], x, use_reentrant=True)
        between()
        y.square().sum().backward()
        gradients.append(x.grad)
    assert type(layer) is nn.MultiheadAttention
    assert torch.equal(*gradients)
