"""Training: a checkpoint goes on bit for bit, data is what it says, bad files are refused."""

import dataclasses
import math
import resource
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

import tfkern
from tfkern.commands import demo
from tfkern.training import data, pictures, provenance, report, sampling, trainer
from tfkern.training.tasks import TASKS
from tfkern.training.trainer import CheckpointError, Training, schedule


def small(name: str):
    return dataclasses.replace(TASKS[name], rows=4, layers=1, width=16)


@pytest.mark.parametrize("name", TASKS)
def test_resume_is_bit_for_bit(name, tmp_path):
    straight = Training.start(small(name), tfkern.attention, steps=8, seed=3)
    straight.run()
    first = Training.start(small(name), tfkern.attention, steps=8, seed=3)
    first.run(until=5)
    first.save(tmp_path / "c.safetensors")
    torch.manual_seed(99)  # whatever happens in between
    second = Training.load(tmp_path / "c.safetensors", tfkern.attention)
    assert second.losses == straight.losses[:5]
    second.run()
    assert second.losses == straight.losses
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    training = Training.start(small("vit"), tfkern.attention, steps=2)
    training.save(path)
    before = path.read_bytes()

    def full_disk(tensors, where, metadata):
        where.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    training.step()
    with pytest.raises(OSError, match=r"the checkpoint can't be written .no space"):
        training.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up(tmp_path):
    """As the writer of safetensors meets it."""
    training, limits = Training.start(small("vit"), tfkern.attention, steps=2), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"the checkpoint can't be written .*File too large"):
            training.save(tmp_path / "c.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        Training.load(tmp_path / "absent", tfkern.attention)
    (tmp_path / "broken").write_bytes(b"not a checkpoint at all")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Training.load(tmp_path / "broken", tfkern.attention)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match=r"no checkpoint of `tfkern train` \(format None\)"):
        Training.load(tmp_path / "foreign", tfkern.attention)


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint."""
    training = Training.start(small("vit"), tfkern.attention, steps=2)
    training.step()
    training.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def test_a_flipped_bit_anywhere_is_noticed(saved):
    """In the header, where it may leave good JSON, and in what tensors hold."""
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = [*range(0, header, 37), *torch.randint(header, len(whole), (100,), generator=generator).tolist()]
    for number, place in enumerate(places):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << number % 8]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|not a whole|no checkpoint of|of another version"):
            Training.load(saved, tfkern.attention)
    saved.write_bytes(whole)
    assert len(Training.load(saved, tfkern.attention).losses) == 1


@pytest.mark.parametrize("length", [0, 7, 8, 1000, -1])
def test_a_truncated_checkpoint(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Training.load(saved, tfkern.attention)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format="tfkern-training-1"), "of another version of tfkern .*'tfkern-training-1', here 'tfkern-training-2'"),
        (dict(format="pt"), "no checkpoint of `tfkern train`"),
        (dict(task='{"name": "llama"}'), "of another version's llama"),
        (dict(task='{"name": "vit", "rotary": true}'), "of another version's vit .*rotary"),
        (dict(task='{"name": "vit", "width": 48}'), "of another version's vit .*loading state_dict for ViT:.; train anew$"),
    ],
)
def test_checkpoints_of_others(saved, change, message):
    """Whole, with a checksum that is right."""
    from safetensors.torch import save_file

    about, tensors = trainer._read(saved)
    about |= change
    save_file(tensors, saved, {**about, "sha256": trainer._checksum(about, tensors)})
    with pytest.raises(CheckpointError, match=message):
        Training.load(saved, tfkern.attention)


def test_a_checkpoint_of_another_model(saved):
    assert Training.load(saved, tfkern.attention, model="vit").task.name == "vit"
    with pytest.raises(CheckpointError, match="is of vit, but gpt is wanted; `tfkern train gpt` makes one"):
        Training.load(saved, tfkern.attention, model="gpt")


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; name a file"):
        Training.load(tmp_path, tfkern.attention)
    with pytest.raises(CheckpointError, match="can't be read"):
        Training.load(Path("/dev/null"), tfkern.attention)


def test_text_of_another_python_is_refused(tmp_path, monkeypatch):
    Training.start(small("gpt"), tfkern.attention, steps=1).save(tmp_path / "c")
    other = dataclasses.replace(data.corpus(), characters="abc")
    monkeypatch.setattr(data, "corpus", lambda: other)
    with pytest.raises(CheckpointError, match="another Python's text"):
        Training.load(tmp_path / "c", tfkern.attention)


def losing(*curves) -> report.Comparison:
    """Trainings with these losses."""
    trainings = [Training(None, None, None, None, len(losses), None, losses) for losses in curves]
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


def test_corpus():
    corpus = data.corpus()
    assert len(corpus.train) + len(corpus.held_out) > 300_000
    assert corpus.decode(corpus.encode("The quick")) == "The quick"
    with pytest.raises(ValueError, match="the text has characters"):
        corpus.encode("日本")
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
    task = dataclasses.replace(TASKS["bert"], rows=400)
    ids = task.batch(torch.Generator().manual_seed(0))[1]
    seen, same, chosen = task.mask(ids, torch.Generator().manual_seed(1))
    assert torch.equal(same, ids)
    assert torch.equal(seen[~chosen], ids[~chosen])
    assert chosen.float().mean().item() == pytest.approx(task.share, abs=0.02)
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
    task = dataclasses.replace(small(name.rsplit(maxsplit=1)[-1]), name=name, **sizes)
    return demo.compared(task, backends, 0.02, torch.device("cpu"), 3)


@pytest.fixture(scope="module")
def comparisons():
    """What the demo draws, the default backend being eager."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFKERN_BACKENDS", "eager")
        found = [compared(name, (None,)) for name in TASKS]
    found.append(compared("tiny gpt", ("cpu", "portable"), rows=1, context=8))
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
    training = Training.start(dataclasses.replace(small("gpt"), layers=2), tfkern.attention, steps=1)
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
    training = Training.start(small("gpt"), tfkern.attention, steps=2)
    state = training.generator.get_state()
    monkeypatch.setenv("TFKERN_BACKENDS", "eager")
    assert provenance.backend(training) == "eager"
    assert provenance.backend(training, "cpu") == "cpu"
    assert torch.equal(training.generator.get_state(), state)
    assert all(block.attn.attention is tfkern.attention for block in training.model.blocks)
    assert provenance.label("portable", torch.device("cpu")) == "portable in Triton's interpreter"


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
