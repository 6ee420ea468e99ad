"""`tfkern train` on a user's data, with its presets and flags, and `generate` and `classify` with what it trained."""

import contextlib
import io
import json
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import cli
from tfkern.commands import train, train_progress
from tfkern.models.bert import BERTConfig, MaskedLM
from tfkern.models.pretrained import save_pretrained
from tfkern.models.tokens import Subwords
from tfkern.training import checkpoints, kinds
from tfkern.training.presets import BUILT_IN, OWN, PRESETS
from tfkern.training.recipe import Recipe
from tfkern.training.trained import Trained
from tfkern.training.trainer import Training

sys.path.append(str(Path(__file__).resolve().parent))
from small_trainings import pictures, sentences, small

TINY = ["--layers", "1", "--width", "16", "--rows", "4"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; gives its status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments) -> tuple[int, str, str]:
        status = cli.main([str(x) for x in arguments])
        found = capsys.readouterr()
        return status, found.out, found.err

    return command


def done(result: tuple[int, str, str]) -> str:
    status, out, err = result
    assert status == 0, err
    return out


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("bert-base", 109_514_298), ("vit-b16", 86_567_656), ("mixer-b16", 59_880_472)],
)
def test_published_sizes(name, count):
    """GPT-2's smallest; BERT-base with its masked-language-model head; ViT-B/16 and Mixer-B/16 at 224 pixels, 1000 classes."""
    with torch.device("meta"):
        model = kinds.build(PRESETS[name].model, PRESETS[name].config, tfkern.attention)
    assert sum(p.numel() for p in model.parameters()) == count


def test_presets_are_whole():
    for name, preset in PRESETS.items():
        for recipe in filter(None, (preset.recipe, preset.classify)):
            recipe.check()
            assert recipe.warmup is None or recipe.warmup < recipe.steps, name
        assert isinstance(preset.config, kinds.MODELS[preset.model].config_class)
        assert (preset.classify is not None) == (preset.model == "bert")
    for table in (BUILT_IN, OWN):
        assert {model: PRESETS[name].model for model, name in table.items()} == {m: m for m in ("gpt", "bert", "vit", "mixer")}


def test_own_text(run, tmp_path):
    (tmp_path / "own.txt").write_text("naïve 日本 text. " * 100, "utf-8")
    out = done(run("train", "gpt", "--data", "own.txt", "--steps", 40, "--learning-rate", 0.02, "--context", 16, *TINY))
    assert re.match(r"gpt with [\d,]+ parameters on 1,350 tokens of 11 kinds, 150 more held out: .*own\.txt\n", out)
    assert re.search(r"step +10 of 40  loss \d\.\d{4}  [\d,]+ tokens/s  \d+% of step 3 in attention\n", out)
    (tmp_path / "own.txt").unlink()  # a checkpoint needs no data
    out = done(run("generate", "naïve", "--count", 30, "--top-p", 0.5, "--temperature", 0.5))
    assert out.startswith("naïve 日本 text. ")
    assert done(run("generate", "naïve", "--count", 30, "--top-p", 1e-9)) == done(
        run("generate", "naïve", "--count", 30, "--top-k", 1)
    )
    status, _, err = run("train", "gpt", "--resume")
    assert status == 2
    assert "there is no file" in err
    (tmp_path / "moved.txt").write_text("naïve 日本 text. " * 99, "utf-8")
    status, _, err = run("train", "gpt", "--resume", "--data", "moved.txt")
    assert status == 2
    assert "moved.txt is not what it was trained on; name the right --data, or train anew" in err
    (tmp_path / "moved.txt").write_text("naïve 日本 text. " * 100, "utf-8")
    assert "going on after step 40 of 40" in done(run("train", "gpt", "--resume", "--data", "moved.txt"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer with BERT's special tokens, in a file."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(["with xa without y ab 日本 🙂"] * 9, vocab_size=300, special_tokens=special)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_own_tokenizer(run, tmp_path, tokenizer):
    """Text of bytes: a character of several tokens is written once it is whole."""
    (tmp_path / "own.txt").write_text("xa ☃ Ж " * 200, "utf-8")
    arguments = ["--data", "own.txt", "--tokenizer", tokenizer, "--steps", 80, "--learning-rate", 0.02, "--context", 16]
    out = done(run("train", "gpt", *arguments, *TINY))
    assert "nats/token" in out
    out = done(run("generate", "xa", "--temperature", 0, "--count", 40))
    assert "xa ☃ Ж xa ☃" in out
    assert "\N{REPLACEMENT CHARACTER}" not in out


@pytest.mark.parametrize("model", ["vit", "mixer"])
def test_own_pictures(run, tmp_path, model):
    folder = pictures(tmp_path / "p")
    sizes = ["--image", 8, "--patch", 4, "--width", 16, "--layers", 1, "--rows", 8]
    out = done(run("train", model, "--data", folder, "--steps", 30, "--learning-rate", 0.01, *sizes))
    assert "on 16 examples of 2 classes, 4 more held out" in out
    assert "held-out images right: 100.0%" in out
    checkpoint = f"tfkern-out/{model}.safetensors"
    inputs = [folder / "dark" / "3.png", folder / "bright" / "5.png"]
    lines = done(run("classify", checkpoint, *inputs)).splitlines()
    for path, line, (best, other) in zip(inputs, lines, (("dark", "bright"), ("bright", "dark")), strict=True):
        first, second = re.fullmatch(rf"{re.escape(str(path))}: {best} ([\d.]+)%, {other} ([\d.]+)%", line).groups()
        assert float(first) > 90
        assert float(first) + float(second) == pytest.approx(100, abs=0.11)
    assert done(run("classify", checkpoint, inputs[0], "--top", 1)).endswith(f"dark {lines[0].split()[2].rstrip(',')}\n")
    (tmp_path / "no.png").write_bytes(b"no image")
    status, out, err = run("classify", checkpoint, inputs[0], "no.png")
    assert (status, out) == (2, "")
    assert err.startswith("tfkern classify: no.png can't be read as an image (")
    assert "absent.png can't be read as an image (no such file)" in run("classify", checkpoint, "absent.png")[2]
    assert "going on after step 30" in done(run("train", model, "--resume"))


def test_sentences_from_a_pretrained_model(run, tmp_path):
    """bert learns a text, then its classifier starts with those weights, then tells new sentences."""
    (tmp_path / "own.txt").write_text("abxy with out " * 99)
    done(run("train", "bert", "--data", "own.txt", "--steps", 3, *TINY))
    sentences(tmp_path / "s.tsv", 60)
    with (tmp_path / "s.tsv").open("a") as file:
        file.write(f"with\tx{'a' * 30}\nwith\tx{'a' * 31}\n")  # the mask before them is one more
    arguments = ["--classify", "s.tsv", "--from", "tfkern-out/bert.safetensors", "--learning-rate", 0.01]
    out = done(run("train", "bert", *arguments, "--steps", 100))
    assert "held-out sentences right: 100.0%" in out
    assert "\n1 of them are longer than --context, 32 tokens, and cut\n" in out
    pretrained, tuned = (
        Trained.read(Path(f"tfkern-out/{n}.safetensors"), tfkern.attention, "cpu", (n,)) for n in ("bert", "bert-classifier")
    )
    assert tuned.form.tokenizer.characters == pretrained.form.tokenizer.characters
    out = done(run("classify", "tfkern-out/bert-classifier.safetensors", "ababab x a", "y a"))
    assert re.fullmatch(r"ababab x a: with [\d.]+%, without [\d.]+%\ny a: without [\d.]+%, with [\d.]+%\n", out)
    status, _, err = run("classify", "tfkern-out/bert-classifier.safetensors", "x", "Z")
    assert status == 2
    assert "tfkern classify: a sentence can't be read: the text has characters ['Z'] that are not known" in err
    assert "must have a token or more, but '' has none" in run("classify", "tfkern-out/bert-classifier.safetensors", "")[2]
    status, _, err = run("classify", "tfkern-out/bert.safetensors", "x")
    assert status == 2
    assert "is of bert, but vit or mixer or bert-classifier is wanted" in err
    assert "going on after step 100" in done(run("train", "bert", "--resume", "--classify", "s.tsv"))


def test_the_first_weights_are_those_of_the_origin(run, tmp_path, tokenizer):
    """A checkpoint of our own and a folder as transformers has it, with a learning rate of 0: nothing but the heads is new."""
    size = Subwords.read(tokenizer).size
    model = MaskedLM(BERTConfig(vocab_size=size, context=32, layers=1, heads=2, width=16))
    save_pretrained(model, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer.read_text("utf-8"), "utf-8")
    sentences(tmp_path / "s.tsv")
    arguments = ["--classify", "s.tsv", "--learning-rate", 0, "--steps", 2]
    done(run("train", "bert", *arguments, "--from", "theirs", "--out", "one"))
    done(run("train", "bert", *arguments, "--from", "one/bert-classifier.safetensors", "--out", "two"))
    one, two = (checkpoints.read(Path(f"{n}/bert-classifier.safetensors"))[1] for n in ("one", "two"))
    for name, value in model.bert.state_dict().items():
        assert torch.equal(one[f"model.bert.{name}"], value), name
    assert all(torch.equal(two[name], one[name]) for name in one if name.startswith("model."))
    sentences(tmp_path / "three.tsv")
    with (tmp_path / "three.tsv").open("a") as file:
        file.write("third\tab\nthird\tba\n")
    done(
        run(
            "train",
            "bert",
            "--classify",
            "three.tsv",
            "--learning-rate",
            0,
            "--steps",
            1,
            "--from",
            "one/bert-classifier.safetensors",
            "--out",
            "x",
        )
    )
    assert checkpoints.read(Path("x/bert-classifier.safetensors"))[1]["model.head.weight"].shape == (3, 16)  # a fresh head
    Training.start(small("vit"), tfkern.attention, steps=1).save(tmp_path / "vit.safetensors")
    status, _, err = run("train", "vit", "--from", "vit.safetensors", "--out", "y", "--patch", "4")
    assert status == 2
    assert "--patch can't be given with --from, whose model has its sizes already" in err
    status, _, err = run("train", "gpt", "--from", "vit.safetensors", "--out", "y")
    assert status == 2
    assert "vit.safetensors is of vit, but gpt is wanted" in err


def test_an_origin_that_does_not_fit(run, tmp_path, tokenizer):
    save_pretrained(MaskedLM(BERTConfig(vocab_size=9, context=32, layers=1, heads=2, width=16)), tmp_path / "theirs")
    sentences(tmp_path / "s.tsv")
    status, _, err = run("train", "bert", "--classify", "s.tsv", "--from", "theirs")
    assert status == 2
    assert "--from theirs brings no tokenizer.json; name one by --tokenizer" in err
    status, _, err = run("train", "bert", "--classify", "s.tsv", "--from", "theirs", "--tokenizer", tokenizer)
    assert status == 2
    assert "--from theirs does not fit: it has no weights of the right shape for bert.tokens.weight" in err


def test_flags_that_do_not_fit(run, tmp_path):
    (tmp_path / "t.txt").write_text("text " * 99)
    (tmp_path / "s.tsv").write_text("a\tb\n")
    for arguments, message in [
        (["gpt", "--preset", "bert-base"], "--preset must be one of gpt-small, gpt2 for gpt, but is 'bert-base'"),
        (["gpt", "--classify", "s.tsv"], "--classify is for bert, but the model is gpt"),
        (["bert", "--classify", "s.tsv", "--data", "t.txt"], "--classify and --data can't be given together"),
        (["vit", "--tokenizer", "x"], "--tokenizer is for gpt and bert, but the model is vit"),
        (["mixer", "--heads", "2"], "--heads is not a size of mixer; leave it out"),
        (["gpt", "--image", "8"], "--image is not a size of gpt"),
        (["gpt", "--width", "30"], "--width must be a multiple of --heads, but they are 30 and 4"),
        (["gpt", "--rows", "8", "--accumulate", "3"], "--rows must be a multiple of --accumulate, 3, but is 8"),
        (["gpt", "--data", "absent"], "there is no file absent"),
        (["vit", "--data", "t.txt"], "t.txt must be a folder with a subfolder of images for each class, but is a file"),
        (["gpt", "--data", "t.txt"], "a context of 64 needs 65 of each"),
        (["gpt", "--tokenizer", "t.txt"], "t.txt is no tokenizer.json"),
        (["gpt", "--from", "absent"], "--from must be a checkpoint of `tfkern train` or a folder of weights"),
        (["gpt", "--resume", "--preset", "gpt2"], "--preset can't be given with --resume, which takes everything from the"),
        (["gpt", "--resume", "--from", "x"], "--from can't be given with --resume"),
        (["gpt", "--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
        (["gpt", "--mask-share", "1.5"], "argument --mask-share: must be a number, from 0.01 to 1.0, but is '1.5'"),
        (["gpt", "--learning-rate", "1e300"], "must be a number, from 0.0 to 1000000.0, but is '1e300'"),
        (["bert", "--mask-share", "0"], "argument --mask-share: must be a number, from 0.01 to 1.0, but is '0'"),
        (["gpt", "--mask-share", "0.5"], "--mask-share is for the pre-training of bert, but this trains gpt; leave it out"),
    ]:
        status, _, err = run("train", *arguments)
        assert (status, message in err) == (2, True), err
    assert not list((tmp_path / "tfkern-out").glob("*")), "nothing is written"


def test_flags_take_the_place_of_the_presets(run):
    flags = ["--steps", 2, "--rows", 4, "--accumulate", 2, "--warmup", 1, "--weight-decay", 0.3, "--clip", 0.5, "--amp", "bf16"]
    done(run("train", "vit", *flags, "--width", 16, "--dropout", 0.2, "--seed", 5, "--preset", "vit-small"))
    training = Training.load(Path("tfkern-out/vit.safetensors"), tfkern.attention)
    wanted = Recipe(2, 4, 4e-3, warmup=1, weight_decay=0.3, clip=0.5, accumulate=2, amp="bf16")
    assert training.recipe == wanted
    assert (training.model.config.width, training.model.config.dropout, training.model.config.layers) == (16, 0.2, 2)
    for flag, value in (("--clip", 1.0), ("--amp", "none"), ("--layers", 1)):
        status, _, err = run("train", "vit", "--resume", flag, value)
        assert status == 2
        assert f"{flag} {value} does not fit: leave it out, or train anew into another --out" in err
    assert "going on after step 2 of 2" in done(run("train", "vit", "--resume", *flags))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    """One line that is drawn over, with what the lines of a log have and the time that is left."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    training = Training.start(small("vit"), tfkern.attention, steps=4)
    with train_progress.Steps(training) as steps:
        training.run(on_step=steps.show)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stdout.getvalue())
    assert re.search(rf"step 4/4 ━.*loss {training.losses[-1]:.4f}  [\d,]+ tokens/s  \d+% in attention 0:00:\d\d\n", text)


def test_tokens_a_second(monkeypatch, capsys):
    """Over the last twenty steps: four images of 17 tokens each tenth of a second."""
    clock = iter(range(50, 1000))
    monkeypatch.setattr(train_progress.time, "perf_counter", lambda: next(clock) / 10)
    training = Training.start(small("vit"), tfkern.attention, steps=30)
    training.watch.measuring = lambda device: contextlib.nullcontext()
    with train_progress.Steps(training) as steps:
        training.run(on_step=steps.show)
    assert re.findall(r"step +(\d+) of 30  loss \d\.\d{4}  ([\d,]+) tokens/s", capsys.readouterr().out) == [
        ("10", "680"), ("20", "680"), ("30", "680"),
    ]  # fmt: skip


def test_two_trainings_into_one_folder(run, tmp_path):
    """The second is refused; the lock of one that was killed is in nobody's way."""
    fcntl = pytest.importorskip("fcntl")
    beside = tmp_path / "tfkern-out" / "vit.safetensors.lock"
    beside.parent.mkdir()
    with open(beside, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for arguments in (["--steps", 1], ["--resume"]):
            status, _, err = run("train", "vit", *arguments)
            assert status == 2
            assert "another training writes tfkern-out/vit.safetensors: wait for its end, or name another --out" in err
    assert beside.exists()
    done(run("train", "vit", "--steps", 1, *TINY))
    assert [path.name for path in beside.parent.iterdir()] == ["vit.safetensors"]


def test_a_second_interrupt_ends_at_once():
    event = threading.Event()
    with train._signals_set(event):
        for number in (signal.SIGTERM, signal.SIGTERM):  # as a manager of processes may send it
            signal.raise_signal(number)
        assert event.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_prompts_without_tokens(run, tmp_path, tokenizer):
    (tmp_path / "own.txt").write_text("xa y " * 200)
    made = json.loads(tokenizer.read_text("utf-8"))
    made["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    done(run("train", "gpt", "--data", "own.txt", "--tokenizer", "tokenizer.json", "--steps", 1, "--context", 8, *TINY))
    status, _, err = run("generate", " ")
    assert (status, "the prompt must have a token or more, but ' ' has none" in err) == (2, True)
    status, _, err = run("generate", "\udcff")
    assert (status, r"the text must be UTF-8, but is '\udcff'" in err) == (2, True)
