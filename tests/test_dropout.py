"""The random bits: right Philox, the same for everyone who asks, fair, and governed by torch's generator."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tfkern
from tfkern import configs, dropout, reference

BACKENDS = pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])


@pytest.fixture
def qkv(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 40, 16, generator=generator).to(device).requires_grad_() for _ in range(3)]


# Counters, key, rounds and words, from the known answers of the Random123 distribution.
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0, 0, 0, 0), (0, 0), 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 10,
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: f"{a[0][0]:x}-{a[2]}")
def test_known_answers(answer):
    counter, key, rounds, words = answer
    found = dropout.philox(*(torch.tensor(c) for c in counter), *key, rounds)
    assert tuple(int(w) for w in found) == words


def weights(p: float, backend: str, device, n=64, heads=2, batch=2, **options) -> torch.Tensor:
    """What dropout makes of each weight, seen by giving all weights the same size and each key its own value."""
    q = torch.zeros(batch, heads, n, 1, device=device)
    v = torch.eye(n, device=device).expand(batch, heads, n, n)
    return tfkern.attention(q, q, v, dropout_p=p, backend=backend, **options) * n


@BACKENDS
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_bits_are_those_of_the_host(p, backend, device):
    torch.manual_seed(5)
    found = weights(p, backend, device)
    torch.manual_seed(5)
    want = reference.kept(dropout.draw_seed(torch.device(device)), p, found.shape)
    torch.testing.assert_close(found, want.float(), rtol=1e-6, atol=0)


@BACKENDS
def test_the_threshold_itself_survives(backend, device):
    """Numbers below p * 65536 drop. For each of some elements, p is set to where its own number stands: forward and, in dV, the
    backward's transposed bits keep it."""
    torch.manual_seed(5)
    seed = dropout.draw_seed(torch.device(device))
    for i, j in ((0, 0), (3, 9), (15, 7), (8, 12)):
        lo, hi = 0, dropout.STEPS  # the largest threshold at which (i, j) is kept
        while hi - lo > 1:
            middle = (lo + hi) // 2
            kept = reference.kept(seed, middle / dropout.STEPS, (1, 1, 16, 16))[0, 0, i, j] > 0
            lo, hi = (middle, hi) if kept else (lo, middle)
        q = torch.zeros(1, 1, 16, 1, device=device)
        v = torch.eye(16, device=device)[None, None].requires_grad_()
        torch.manual_seed(5)
        out = tfkern.attention(q, q, v, dropout_p=lo / dropout.STEPS, backend=backend)
        (dv,) = torch.autograd.grad(out[0, 0, i].sum(), v)
        assert out[0, 0, i, j] > 0
        assert dv[0, 0, j].sum() > 0


@pytest.mark.parametrize("tiles", [(16, 16), (16, 64), (64, 16), (32, 128)], ids=str)
def test_bits_do_not_hang_on_tiles(qkv, tiles, device):
    def run():
        torch.manual_seed(1)
        out = tfkern.attention(*qkv, torch.zeros(40, 40, device=device), 0.4, window=(19, 3), backend="portable")
        return torch.autograd.grad(out.square().sum(), qkv)

    want = run()
    with configs.override(**dict.fromkeys(configs.KERNELS, configs.TileConfig(*tiles))):
        for x, y in zip(run(), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_fair(p):
    """Shares kept, and agreement of neighbours along every dimension, within four standard deviations of what chance makes."""
    seed = torch.tensor([123456789, 987654321])
    shape = (4, 4, 128, 128)
    keep = reference.kept(seed, p, shape) > 0
    q = 1.0 - p

    def fair(sample, share):
        return abs(sample.double().mean().item() - share) < 4 * (share * (1 - share) / sample.numel()) ** 0.5

    assert fair(keep, q)
    for dim in range(4):
        for step in (1, 2):  # 8 neighbouring keys share a counter
            a, b = keep.narrow(dim, step, shape[dim] - step), keep.narrow(dim, 0, shape[dim] - step)
            assert fair(a & b, q * q), (dim, step)
    assert fair(keep & (reference.kept(seed + 1, p, shape) > 0), q * q)
    assert fair(keep & (reference.kept(seed + torch.tensor([0, 1]), p, shape) > 0), q * q)
    assert fair(keep & (reference.kept(seed + torch.tensor([1 << 32, 0]), p, shape) > 0), q * q)


@BACKENDS
def test_mean_stays(backend, device):
    torch.manual_seed(0)
    found = weights(0.3, backend, device)
    assert abs(found.mean().item() - 1.0) < 4 * (0.3 / 0.7 / found.numel()) ** 0.5


@BACKENDS
def test_extreme_probabilities(qkv, backend):
    plain = tfkern.attention(*qkv, backend=backend)
    all_gone = tfkern.attention(*qkv, dropout_p=1.0, backend=backend)
    assert torch.equal(all_gone, torch.zeros_like(all_gone))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(all_gone.sum(), qkv))
    almost_none = tfkern.attention(*qkv, dropout_p=1e-9, backend=backend)  # less than half a step of 1 / 65536
    torch.testing.assert_close(almost_none, plain, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    one_step = tfkern.attention(*qkv, dropout_p=65535 / 65536, backend=backend)
    assert (one_step == 0).any()
    assert one_step.isfinite().all()


@BACKENDS
def test_generator(qkv, backend, device):
    def run(**options):
        return tfkern.attention(*qkv, dropout_p=0.5, backend=backend, **options)

    torch.manual_seed(0)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(run(), first)
    state = torch.get_rng_state()
    tfkern.attention(*qkv, backend=backend)
    tfkern.explain(*qkv, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


@BACKENDS
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays(qkv, backend, reentrant):
    def run(*t):
        return tfkern.attention(*t, dropout_p=0.5, backend=backend).square().sum()

    torch.manual_seed(0)
    want = torch.autograd.grad(run(*qkv), qkv)
    torch.manual_seed(0)
    checkpoint(run, *qkv, use_reentrant=reentrant).backward()
    for x, y in zip(qkv, want, strict=True):
        assert torch.equal(x.grad, y)


@BACKENDS
def test_a_packed_sequence_drops_as_its_batch(device, backend):
    """Sequence b of a packed call and batch b of a dense one share their bits."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 24, 2, 16, generator=generator).to(device) for _ in range(3))
    cu = torch.arange(0, 73, 24, dtype=torch.int32, device=device)
    torch.manual_seed(0)
    dense = tfkern.attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5, backend=backend)
    torch.manual_seed(0)
    packed = tfkern.attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, dropout_p=0.5, backend=backend)
    torch.testing.assert_close(packed.unflatten(0, (3, 24)).transpose(1, 2), dense, rtol=1e-6, atol=1e-6)
