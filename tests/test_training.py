"""Training: what a step does in each mode, and that a checkpoint goes on from it bit for bit."""

import dataclasses
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.text import Text

import tfkern
from tfkern.commands import demo
from tfkern.ending import InputError
from tfkern.training import data, pictures, provenance, report, sampling
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


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_gradients_that_are_not_finite(amp):
    """No step is made, so that no checkpoint has what they would leave; a loss scale is halved first, down to 1."""
    training = Training.start(small("gpt", amp=amp), tfkern.attention, steps=9)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=amp == "fp16")
    training.step()
    before = [p.clone() for p in training.model.parameters()]
    training.model.blocks[0].mlp.register_forward_hook(lambda _, inputs, out: out * math.inf)
    with pytest.raises(InputError, match=f"step {2 if amp == 'none' else 4} has gradients that are not finite and is not made"):
        training.run()
    assert all(torch.equal(p, q) for p, q in zip(before, training.model.parameters(), strict=True))


def test_rows_that_cannot_be_dealt_out():
    with pytest.raises(InputError, match="--rows must be a multiple of --accumulate, 3, but is 4"):
        Training.start(small("vit", accumulate=3), tfkern.attention)


def test_weight_decay_is_not_of_biases_and_norms():
    training = Training.start(small("vit", weight_decay=0.5), tfkern.attention)
    decayed, others = ({id(p) for p in group["params"]} for group in training.optimizer.param_groups)
    assert [group["weight_decay"] for group in training.optimizer.param_groups] == [0.5, 0.0]
    for name, p in training.model.named_parameters():
        assert id(p) in (others if name.endswith(".bias") or "norm" in name else decayed), name


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
    task, seconds = small("gpt"), 0.0

    def attention(query, key, value, **options):
        return Sleeping.apply(tfkern.attention(query, key, value, **options), seconds)

    training = Training.start(task, attention, steps=9)
    training.run(until=2)
    assert training.share is None
    seconds = 0.1
    elsewhere = training.model.blocks[0].mlp.register_forward_hook(lambda *_: time.sleep(0.2))
    training.step()
    step, share = training.share
    assert step == 3
    assert 0.4 < share < 0.56  # what the rest of the step takes is in neither half
    elsewhere.remove()
    seconds = 0.0
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


def losing(*curves) -> report.Comparison:
    """Trainings with these losses."""
    trainings = [SimpleNamespace(losses=losses, steps=len(losses)) for losses in curves]
    return report.Comparison("x", [report.Run(str(n), t, None, {}) for n, t in enumerate(trainings)], 0.1)


def test_distances_of_curves():
    three = losing([1.0, 2.0], [1.5, 2.0], [1.0, 1.0])
    assert three.apart == 1.0
    assert three.from_naive.tolist() == [[0.5, 0.0], [0.0, 1.0]]
    assert losing([1.0], [1.5], [0.75]).apart == 0.75  # of those two that are not naive
    assert math.isnan(losing([1.0, math.nan], [1.0, 2.0]).apart)
    assert math.isnan(losing([1.0, 2.0], [1.0, 2.0], [math.nan, 2.0]).apart)


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
    text = corpus.decode(corpus.train.tolist())
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


def compared(name: str, backends: tuple, **sizes) -> report.Comparison:
    """A small model trained for three steps."""
    task = small(name.rsplit(maxsplit=1)[-1])
    if sizes:
        recipe = task.recipe.changed(rows=sizes.pop("rows"))
        task = dataclasses.replace(task, config=dataclasses.replace(task.config, **sizes), recipe=recipe, name=name)
    return demo.compared(task, backends, 0.02, torch.device("cpu"), 3)


@pytest.fixture(scope="module")
def comparisons():
    """What the demo draws, the default backend being eager."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFKERN_BACKENDS", "eager")
        found = [compared(name, (None,)) for name in TASKS]
    found.append(compared("tiny gpt", ("cpu", "portable"), rows=1, context=8, heads=1))
    return {c.name: c for c in found}


@pytest.mark.cpu
def test_every_run_names_its_backend(comparisons):
    assert [run.by for run in comparisons["tiny gpt"].runs] == ["naive", "cpu", "portable in Triton's interpreter"]
    for name in TASKS:
        assert [run.by for run in comparisons[name].runs] == ["naive", "eager"]
    assert [sum(run.launches.values()) > 0 for run in comparisons["tiny gpt"].runs] == [False, False, True]
    rows = report.summary(comparisons)
    assert [row[1] for row in rows if row[0] == "tiny gpt"] == ["naive", "cpu", "portable in Triton's interpreter"]
    assert all(len(row) == len(report.HEADINGS) for row in rows)
    assert report.samples(comparisons["gpt"].shown, comparisons["bert"].shown, 5).startswith("tfkern 0.")
    assert "attention by eager; torch" in report.samples(comparisons["gpt"].shown, comparisons["bert"].shown, 5)


@pytest.fixture(scope="module")
def figures(comparisons):
    return pictures.draw(comparisons, seed=5)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.cpu
def test_every_picture_names_who_computed_it(figures):
    for name, figure in figures.items():
        (foot,) = (text for text in texts(figure) if text.startswith("tfkern 0."))
        everyone = "naive, eager, cpu, portable in Triton's interpreter; Triton 3."
        assert f"attention by {everyone if name == 'loss.png' else 'eager; torch 2.'}" in foot
        assert "seed 5" in foot
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>")


@pytest.mark.cpu
def test_loss_curves_and_their_differences(figures, comparisons):
    """Two panels a model: the curves, and how far they are from the naive one."""
    axes = figures["loss.png"].axes
    assert len(axes) == 2 * len(comparisons)
    for curves, differences, c in zip(axes[::2], axes[1::2], comparisons.values(), strict=True):
        assert [line.get_label() for line in curves.lines] == [run.by for run in c.runs]
        for line, run in zip(curves.lines, c.runs, strict=True):
            assert line.get_ydata().tolist() == run.training.losses
        assert curves.get_ylabel().startswith("training loss\n(nats per ")
        assert (differences.get_yscale(), differences.get_ylabel()) == ("log", "difference\n(nats)")
        assert differences.get_ylim() == axes[1].get_ylim()
        *points, bound = differences.lines
        assert bound.get_ydata() == [c.bound, c.bound]
        for line, run, wanted in zip(points, c.runs[1:], c.from_naive, strict=True):
            assert line.get_label() == f"|{run.by} - naive|, at most {wanted.max():.1e}"
            assert torch.equal(torch.as_tensor(line.get_ydata()).nan_to_num(0.0), wanted)
    assert len(axes[-2].lines) == 3


@pytest.mark.cpu
def test_maps_say_which_head_and_have_one_scale(figures, comparisons):
    text, digit = figures["attention-text.png"], figures["attention-digit.png"]
    for figure, of in ((text, "GPT, layer 1, head"), (digit, "ViT, layer 1, head")):
        (title,) = (t for t in texts(figure) if t.startswith(of))
        assert "of its 4 heads" in title
        assert "highest mean Σ weight²" in title
        assert any(t.startswith("attention weight") for t in texts(figure))
    images = [axes.images[0] for axes in digit.axes if axes.images]
    assert len(images) == 2 * pictures.DIGITS
    for line in (images[: pictures.DIGITS], images[pictures.DIGITS :]):
        assert len({image.get_clim() for image in line}) == 1
    assert images[-1].get_clim()[1] == max(image.get_array().max() for image in images[pictures.DIGITS :])
    shown = torch.from_numpy(text.axes[0].images[0].get_array().filled(math.nan))
    assert torch.allclose(shown.nansum(-1), torch.ones(48))  # weights themselves, not their square roots
    weights, _ = pictures.weights_of(comparisons["gpt"].shown, data.corpus().held_out[None, :48])
    assert (shown.nan_to_num() == weights[0, 0]).all(-1).all(-1).sum() == 1


def test_the_sharpest_head():
    weights = torch.full((2, 3, 4, 5, 6), 1 / 6)  # layers, batch, heads, queries, keys
    weights[1, :, 2, :, 1] = 0.5
    weights[0, 0, 3] = 0.35  # sharper, but of one of three only
    assert pictures.sharpest(weights) == (1, 2)


def test_the_head_over_text_is_sharp_beyond_neighbours(monkeypatch):
    """One that only looks at itself and the character before is not shown."""
    weights = torch.ones(2, 1, 2, 48, 48).tril()
    weights[0, 0, 0] = torch.eye(48) + torch.eye(48).roll(-1, 1).tril()
    weights[1, 0, 1, :, 0] = 20.0
    weights /= weights.sum(-1, keepdim=True)
    monkeypatch.setattr(pictures, "weights_of", lambda run, ids: (weights, None))
    assert any(text.startswith("GPT, layer 2, head 2, ") for text in texts(pictures.text_map(None)))


def test_weights_are_in_the_order_of_layers():
    training = Training.start(
        dataclasses.replace(small("gpt"), config=dataclasses.replace(small("gpt").config, layers=2)), tfkern.attention, steps=1
    )
    ids, model = data.corpus().held_out[None, :9], training.model
    weights, logits = pictures.weights_of(report.Run("cpu", training, None, {}), ids)
    attn, x = model.blocks[0].attn, model.tokens(ids) + model.positions.weight[:9]
    q, k, _ = attn.qkv(model.blocks[0].norm_1(x)).view(1, 9, 3, 4, -1).permute(2, 0, 3, 1, 4)
    wanted, _ = tfkern.reference.attention_weights(q, k, is_causal=True)
    assert torch.allclose(weights[0], wanted)
    assert not torch.allclose(weights[1], wanted, rtol=0.01)
    assert torch.equal(logits, model(ids))


@pytest.mark.cpu
def test_who_attends_is_asked_of_the_calls(monkeypatch):
    """By the model's own calls, for the backend that they name, and without a trace in the training."""
    task = small("gpt")
    task = dataclasses.replace(task, config=dataclasses.replace(task.config, dropout=0.5))
    training = Training.start(task, tfkern.attention, steps=2)
    state, of_dropout = training.generator.get_state(), torch.get_rng_state()
    monkeypatch.setenv("TFKERN_BACKENDS", "eager")
    assert provenance.backend(training) == "eager"
    assert provenance.backend(training, "cpu") == "cpu"
    assert torch.equal(training.generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), of_dropout)
    assert provenance.backend(Training.start(small("mixer"), tfkern.attention)) == ""
    assert all(block.attn.attention is training.watch for block in training.model.blocks)
    assert provenance.label("portable", torch.device("cpu")) == "portable in Triton's interpreter"


def drift(attend, exact, steps: int) -> list[float]:
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
    """40 steps. With delta of a rounded output, as in PyTorch's fused attention, the weights of queries and keys go elsewhere, by
    more than their whole way; with precise_delta by less than a hundredth of it."""

    def exact(q, k, v):
        return tfkern.reference.attention(q.double(), k.double(), v.double())

    def precise(q, k, v):
        return tfkern.attention(q, k, v, backend="eager", precise_delta=True)

    assert min(drift(torch.nn.functional.scaled_dot_product_attention, exact, steps=40)) > 1
    assert max(drift(precise, exact, steps=40)) < 0.01


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
