"""Training: what a step does in each mode, and that a checkpoint goes on from it bit for bit."""

import dataclasses
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tfkern
from tfkern.ending import InputError
from tfkern.training import data, report, sampling
from tfkern.training.presets import TASKS
from tfkern.training.recipe import schedule
from tfkern.training.trainer import Training

sys.path.append(str(Path(__file__).resolve().parent))
from small_trainings import judging, same_weights, small


def resumed(task, path, steps: int = 8) -> tuple[Training, Training]:
    """(a training straight to its end, one that was saved after five steps and went on from the file)."""
    straight = Training.start(task, tfkern.attention, steps=steps, seed=3)
    straight.run()
    first = Training.start(task, tfkern.attention, steps=steps, seed=3)
    first.run(until=5)
    first.save(path)
    torch.manual_seed(99)  # whatever happens in between
    second = Training.load(path, tfkern.attention)
    assert second.losses == straight.losses[:5]
    second.run()
    return straight, second


@pytest.mark.parametrize("name", ["gpt", "bert", "vit", "mixer"])
def test_resume_is_bit_for_bit(name, tmp_path):
    straight, second = resumed(small(name), tmp_path / "c.safetensors")
    assert second.losses == straight.losses
    assert same_weights(straight.model, second.model)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_resume_with_everything(amp, tmp_path):
    """Mixed precision, accumulation, dropout, a user's own data and lengths that differ."""
    straight, second = resumed(judging(tmp_path, amp=amp, accumulate=2), tmp_path / "c.safetensors")
    assert second.losses == straight.losses
    assert same_weights(straight.model, second.model)
    assert second.scaler.state_dict() == straight.scaler.state_dict()


def test_the_scaler_goes_on(tmp_path):
    """A loss scale that overflows: the steps are left out and the scale halved, which the checkpoint keeps."""
    training = Training.start(small("gpt", amp="fp16", learning_rate=1e-3), tfkern.attention, steps=9)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.clone() for p in training.model.parameters()]
    training.step()
    assert all(torch.equal(p, q) for p, q in zip(before, training.model.parameters(), strict=True))
    assert training.scaler.get_scale() == 2.0**39
    training.save(tmp_path / "c")
    assert Training.load(tmp_path / "c", tfkern.attention).scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_alike(amp):
    """The model computes in 16 bits, its weights stay in 32, and the loss curve is that of 32 bits but for rounding."""
    seen = []

    def attention(query, *more, **options):
        seen.append(query.dtype)
        return tfkern.attention(query, *more, **options)

    losses = []
    for one in ("none", amp):
        training = Training.start(small("gpt", amp=one), attention, steps=20)
        training.run()
        losses.append(torch.tensor(training.losses))
        assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    assert set(seen) == {torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.05
    assert losses[1][-1] < losses[1][0] - 0.3


@pytest.mark.parametrize("name", ["gpt", "bert", "vit", "sentences"])
def test_accumulation_is_one_big_batch(name, tmp_path):
    """Up to the order of sums; bert's parts have different numbers of holes, and sentences different lengths."""
    curves = []
    for parts in (1, 4):
        settings = dict(rows=8, accumulate=parts)
        task = judging(tmp_path, **settings) if name == "sentences" else small(name, **settings)
        task = dataclasses.replace(task, config=dataclasses.replace(task.config, dropout=0.0))
        training = Training.start(task, tfkern.attention, steps=6)
        training.run()
        curves.append(torch.tensor(training.losses))
    torch.testing.assert_close(*curves, atol=2e-5, rtol=0)
    assert curves[0][0] != curves[0][-1]


def test_a_batch_without_holes_changes_nothing():
    """A mask share so small that no token of a part, or of all parts, is to be told."""
    training = Training.start(small("bert", mask_share=0.0, accumulate=2, weight_decay=0.0), tfkern.attention, steps=3)
    before = [p.clone() for p in training.model.parameters()]
    assert training.step() == 0.0
    assert all(torch.equal(p, q) for p, q in zip(before, training.model.parameters(), strict=True))


def test_rows_that_cannot_be_dealt_out():
    with pytest.raises(InputError, match="--rows must be a multiple of --accumulate, 3, but is 4"):
        Training.start(small("vit", accumulate=3), tfkern.attention)


def test_weight_decay_is_of_matrices():
    training = Training.start(small("vit", weight_decay=0.5), tfkern.attention)
    decayed, others = ({id(p) for p in group["params"]} for group in training.optimizer.param_groups)
    assert [group["weight_decay"] for group in training.optimizer.param_groups] == [0.5, 0.0]
    names = {id(p): name for name, p in training.model.named_parameters()}
    assert {names[p] for p in decayed} == {
        "embed.weight", "head.weight", *(f"blocks.0.{x}.weight" for x in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")),
    }  # fmt: skip
    assert "positions" in {names[p] for p in others}


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_gradients_are_clipped(amp):
    """After one step of plain descent in the place of AdamW, the weights have moved by the clip's norm."""
    training = Training.start(small("vit", clip=0.01, amp=amp), tfkern.attention, steps=1)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=amp == "fp16")  # which does not overflow
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in training.model.parameters()]).clone()
    training.step()
    after = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    moved = (after - before).norm() / training.recipe.rate(0)
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


class Sleeping(torch.autograd.Function):
    """Sleeps as long in its backward as in its forward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None


def test_share_of_time_in_attention():
    """An attention that sleeps in both directions, in a step that sleeps elsewhere as long: a half, of the third step."""
    task = small("gpt")

    def attention(query, key, value, **options):
        return Sleeping.apply(tfkern.attention(query, key, value, **options), 0.1)

    training = Training.start(task, attention, steps=9)
    training.run(until=2)
    assert training.share is None
    elsewhere = training.model.blocks[0].mlp.register_forward_hook(lambda *_: time.sleep(0.2))
    training.step()
    step, share = training.share
    assert step == 3
    assert 0.4 < share < 0.56  # what the rest of the step takes is in neither half
    elsewhere.remove()
    training.step()
    assert training.share == (step, share)
    without = Training.start(small("mixer"), attention, steps=3)
    without.run()
    assert without.share is None


@pytest.mark.slow
def test_compiled(tmp_path):
    """torch.compile trains as eager does, up to rounding, and resumes bit for bit. A minute of a C++ compiler."""
    straight, second = resumed(small("gpt", compile=True), tmp_path / "c")
    assert second.losses == straight.losses
    assert straight.share is None  # a compiled step is not measured
    eager = Training.start(small("gpt"), tfkern.attention, steps=8, seed=3)
    eager.run()
    torch.testing.assert_close(torch.tensor(eager.losses), torch.tensor(straight.losses), atol=1e-3, rtol=0)
    assert set(eager.model.state_dict()) == set(straight.model.state_dict())


def test_a_loss_that_is_nan_is_a_difference():
    runs = (SimpleNamespace(losses=losses) for losses in ([1.0, math.nan], [1.0, 2.0]))
    pair = report.Pair("x", *runs, None, None)
    assert math.isnan(pair.apart)


def test_stops_when_told():
    training = Training.start(small("vit"), tfkern.attention, steps=9)
    training.run(on_step=lambda t: len(t.losses) == 4)
    assert len(training.losses) == 4


def test_schedule():
    shares = [schedule(step, 100) for step in range(100)]
    assert shares[9] == 1.0 == max(shares)
    assert shares[:10] == sorted(shares[:10])
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0.1 < shares[-1] < 0.11
    assert schedule(0, 1) == 1.0
    assert [schedule(step, 100, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(0, 100, 0) == 1.0


def test_corpus():
    corpus = data.corpus()
    assert len(corpus.train) + len(corpus.held_out) > 300_000
    assert corpus.decode(corpus.tokenizer.encode("The quick")) == "The quick"
    windows = corpus.windows(corpus.train, 5, 20, torch.Generator().manual_seed(0))
    assert windows.shape == (5, 20)
    text = corpus.decode(corpus.train)
    assert all(corpus.decode(row) in text for row in windows)


def test_digits():
    (images, labels), (held_images, held_labels) = data.digits()
    assert len(labels) + len(held_labels) == 1797
    assert images.shape[1:] == (1, 8, 8) == held_images.shape[1:]
    assert images.min() == -1.0
    assert images.max() == 1.0
    assert set(held_labels.tolist()) == set(range(10))


def test_masking():
    task = TASKS["bert"]
    ids = task.batch(torch.Generator().manual_seed(0), 400)[1]
    seen, same, chosen = task.mask(ids, torch.Generator().manual_seed(1))
    assert torch.equal(same, ids)
    assert torch.equal(seen[~chosen], ids[~chosen])
    assert chosen.float().mean().item() == pytest.approx(task.recipe.mask_share, abs=0.02)
    assert (seen[chosen] == task.mask_id).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (seen[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_sampling():
    gpt = Training.start(small("gpt"), tfkern.attention, steps=1)
    text = sampling.continued(gpt, "The ", 10)
    assert text.startswith("The ")
    assert len(text) == 14
    assert text == sampling.continued(gpt, "The ", 10)
    long = "The " * 30  # more than the context
    assert sampling.continued(gpt, long, 3).startswith(long)
    assert "right):" in sampling.filled(Training.start(small("bert"), tfkern.attention, steps=1))


def drift(attend, exact, steps: int = 200) -> list[float]:
    """How far weights (W_q, W_k) that gradient descent trains by `attend` end from those that it trains by `exact`, in units
    of the way that those went: one layer of attention on bfloat16, its weights in float32, its target another layer."""

    def made(dim, sharpness, spread):
        return [torch.eye(dim) * s + spread * torch.randn(dim, dim, generator=generator) / dim**0.5 for s in sharpness]

    def layer(weights, attention):
        q, k, v = (x @ w for w in weights)
        return attention(*(y.bfloat16() for y in (q, k, v + 4))).bfloat16().float()  # values with a mean

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 64, 32, generator=generator)
    start, target = (made(32, (3.0, 3.0, 1.0), spread) for spread in (0.1, 0.3))
    target, ends = layer(target, exact), []
    for attention in (exact, attend):
        weights = [w.clone().requires_grad_() for w in start]
        for _ in range(steps):
            loss = (layer(weights, attention) - target).square().mean()
            for w, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                w.data -= 0.05 * grad
        ends.append([w.detach() for w in weights])
    return [((w - e).norm() / (e - s).norm()).item() for e, w, s in zip(*ends, start, strict=True)][:2]


@pytest.mark.cpu  # beside PyTorch's fused attention for CPUs
def test_precise_delta_takes_the_bias_out_of_a_training():
    """200 steps. With delta of a rounded output, as in PyTorch's fused attention, the weights of queries and keys go elsewhere, by
    more than their whole way; with precise_delta by less than a hundredth of it."""

    def exact(q, k, v):
        return tfkern.reference.attention(q.double(), k.double(), v.double())

    def precise(q, k, v):
        return tfkern.attention(q, k, v, backend="eager", precise_delta=True)

    assert min(drift(torch.nn.functional.scaled_dot_product_attention, exact)) > 1
    assert max(drift(precise, exact)) < 0.01


@pytest.mark.slow
def test_precise_delta_of_the_kernels_in_a_training():
    """30 steps, of the forward and backward in two launches, whose weights are rounded to bfloat16 for their product with values."""

    def exact(q, k, v):
        return tfkern.reference.attention(q.double(), k.double(), v.double())

    def attend(precise):
        return lambda q, k, v: tfkern.attention(q, k, v, backend="portable", precise_delta=precise)

    with tfkern.configs.override(flash_bwd_one_pass=None):
        rounded, precise = (drift(attend(on), exact, steps=30) for on in (False, True))
    assert min(rounded) > 1
    assert max(precise) < 0.01
