"""A user's own data: what is read, what is held out, and what each broken file is told."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import tfkern
from tfkern.ending import InputError
from tfkern.models.gpt import GPTConfig
from tfkern.models.tokens import Characters, Subwords
from tfkern.models.vit import ViTConfig
from tfkern.training import classifying, data, files, opening
from tfkern.training.presets import PRESETS
from tfkern.training.recipe import Recipe
from tfkern.training.trainer import Training

sys.path.append(str(Path(__file__).resolve().parent))
from small_trainings import pictures, sentences

RECIPE = Recipe(steps=2, rows=2, learning_rate=1e-3)


def gpt(path: Path, tokenizer=None, context: int = 8):
    return opening.task("gpt", GPTConfig(context=context, layers=1, heads=1, width=8), RECIPE, path, tokenizer)


@pytest.mark.parametrize("length", [104, 105, 107, 111, 113])
def test_text_of_any_length(tmp_path, length):
    """90 % are trained on, the last tenth is held out, and nothing is lost."""
    text = ("eñ日\r\n🙂x " * 20)[:length]
    (tmp_path / "t").write_bytes(text.encode())
    task = gpt(tmp_path / "t")
    read = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text
    assert task.data.decode(torch.cat([task.data.train, task.data.held_out])) == read
    assert len(task.data.held_out) == len(read) - len(read) * 9 // 10
    training = Training.start(task, tfkern.attention)
    training.run()
    assert training.score().value > 0
    assert str(training.score()).endswith(" nats/char")


def test_texts_that_will_not_do(tmp_path):
    for name, content, message in [
        ("latin", "naïve".encode("latin-1") * 50, "latin must be UTF-8, but has byte 0xef at 2"),
        ("empty", b"", "empty must have some text, but is empty"),
        ("blank", b" \n\n", "blank must have some text"),
        ("short", b"a" * 89, "has 80 tokens to train on and 9 held out, but a context of 9 needs 10 of each: give a longer"),
        ("barely", b"a" * 90, "has 81 tokens to train on and 9 held out"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            gpt(tmp_path / name, context=9)
    with pytest.raises(InputError, match=r"there is no file .*absent"):
        gpt(tmp_path / "absent")
    with pytest.raises(InputError, match="must be a text file, but is a folder"):
        gpt(tmp_path)
    with pytest.raises(InputError, match=r"empty|short: the text has characters \['a'\] that are not known"):
        gpt(tmp_path / "short", Characters("b"))


@pytest.fixture(scope="module")
def subwords(tmp_path_factory) -> Path:
    """A tokenizer.json with BERT's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "with", "out", "x", "y", "a", "b"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("subwords") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_bert_reads_frames(tmp_path, subwords):
    """With a tokenizer that has [CLS] and [SEP] a row is between them, and they are never masked."""
    (tmp_path / "t").write_text("x y a b " * 100)
    config = PRESETS["bert-small"].config
    task = opening.task("bert", config, RECIPE.changed(mask_share=0.9), tmp_path / "t", Subwords.read(subwords))
    seen, ids, chosen = task.batch(torch.Generator().manual_seed(0), 30)
    assert seen.shape == (30, config.context)
    assert set(ids[:, 0].tolist()) == {2}
    assert set(ids[:, -1].tolist()) == {3}
    assert set(ids[:, 1:-1].unique().tolist()) == {7, 8, 9, 10}
    assert not chosen[:, 0].any()
    assert not chosen[:, -1].any()
    assert chosen[:, 1:-1].float().mean() > 0.85
    assert task.build(tfkern.attention).config.vocab_size == 11
    with pytest.raises(InputError, match="the tokenizer must have a special token for mask, which bert needs"):
        opening.task("bert", config, RECIPE, tmp_path / "t", Characters("xyab "))


def test_sentences(tmp_path, subwords):
    found = files.sentences(sentences(tmp_path / "s"), Subwords.read(subwords))
    assert found.classes == ("with", "without")
    assert sorted(torch.cat([found.train, found.held_out]).tolist()) == list(range(20))
    assert found.labels[found.held_out].tolist() == [0, 0, 1, 1]  # a fifth of each class
    ids, lengths = classifying.padded([[7], [8] * 99], found.tokenizer, 6)
    assert ids.tolist() == [[2, 7, 3, 0, 0, 0], [2, 8, 8, 8, 8, 3]]
    assert lengths.tolist() == [3, 6]
    ids, _ = classifying.padded([[1, 0]], Characters("ab", ("mask",)), 6)
    assert ids.tolist() == [[2, 1, 0]]  # the mask stands where no tokenizer has a [CLS]


def test_rows_have_room_for_tokens(tmp_path, subwords):
    (tmp_path / "t").write_text("x y a b " * 100)
    tokenizer = Subwords.read(subwords)
    config = dataclasses.replace(PRESETS["bert-small"].config, context=2)
    for kind, path in (("bert", tmp_path / "t"), ("bert-classifier", sentences(tmp_path / "s"))):
        with pytest.raises(InputError, match="--context must be 3 or more, since 2 tokens frame each row, but is 2"):
            opening.task(kind, config, RECIPE, path, tokenizer)
        opening.task(kind, dataclasses.replace(config, context=3), RECIPE, path, tokenizer)


def test_sentences_as_others_write_them(tmp_path):
    """A byte order mark, CRLF, further tabs, and what Python takes for ends of lines, too."""
    (tmp_path / "s").write_bytes('\ufeffa\t"x"\ty\r\na\tu\u2028v\r\nb\tx\x0cy\r\n\r\nb\tz\x85\r\n'.encode())
    found = files.sentences(tmp_path / "s", None)
    assert found.classes == ("a", "b")
    assert [found.tokenizer.decode(ids) for ids in found.ids] == ['"x"\ty', "u\u2028v", "x\x0cy", "z"]
    (tmp_path / "t").write_bytes("\ufefftext".encode() * 2)
    assert files.text(tmp_path / "t") == "text\ufefftext"


def test_sentences_that_will_not_do(tmp_path):
    for content, message in [
        ("a\tx\nno tab here\n", "line 2, must be a label, a tab and a sentence, but is 'no tab here'"),
        ("a\tx\n\t y\n", "line 2, must be"),
        ("a\tx\na\ty\n", "must have two classes or more, but has a"),
        ("a\tx\na\ty\n\nb\tz\n", "class 'b' must have two sentences or more, one of them held out, but has 1"),
    ]:
        (tmp_path / "s").write_text(content)
        with pytest.raises(InputError, match=message):
            files.sentences(tmp_path / "s", None)


def vit(folder: Path, channels: int = 3):
    return opening.task("vit", ViTConfig(image=8, patch=4, channels=channels, layers=1, heads=1, width=8), RECIPE, folder)


def test_pictures_of_every_kind(tmp_path):
    """Grey, palette, with alpha, CMYK, odd sizes, turned by EXIF: each becomes the model's image."""
    folder = pictures(tmp_path / "p", 3)
    other = folder / "other"
    other.mkdir()
    Image.new("L", (1, 1), 255).save(other / "grey.png")
    Image.new("LA", (50, 7), (255, 0)).save(other / "grey-alpha.png")
    Image.new("RGBA", (7, 50), (255, 255, 255, 9)).save(other / "alpha.PNG")
    Image.new("P", (9, 9)).save(other / "palette.gif")
    Image.new("CMYK", (9, 8)).save(other / "cmyk.jpg")
    Image.new("1", (9, 8), 1).save(other / "bit.bmp")
    turned = Image.new("RGB", (20, 10), (255, 0, 0))
    turned.paste((0, 0, 255), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned.save(other / "turned.png", exif=exif)
    (other / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (other / "._grey.png").write_text("what macOS writes beside files")
    for channels in (1, 3):
        task = vit(folder, channels)
        assert task.data.classes == ("bright", "dark", "other")
        assert len(task.data.labels) == 13
        images, labels = task.load((torch.arange(13),))
        assert images.shape == (13, channels, 8, 8)
        assert images.min() >= -1
        assert images.max() <= 1
        assert images[labels == 0].min() > images[labels == 1].max()
        training = Training.start(task, tfkern.attention)
        training.run()
        assert training.score().name == "held-out images right"
    red, _, blue = files.picture(other / "turned.png", 8, 3)
    assert (blue[0] > 200).all()  # the left half is on top
    assert (red[-1] > 200).all()
    wide = Image.new("RGB", (24, 8))
    wide.paste((255, 255, 255), (8, 0, 16, 8))
    wide.save(tmp_path / "wide.png")
    assert (files.picture(tmp_path / "wide.png", 8, 1)[:, :, 2:6] > 250).all()  # its middle


def test_pictures_that_stay_in_memory_are_those_on_the_disk(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "p")
    kept = vit(folder).data
    monkeypatch.setattr(files, "KEPT", 3 * 8 * 8 * 4)  # four images
    read = vit(folder).data
    assert len(read.read.kept) == 4
    indices = torch.tensor([19, 0, 7, 7, 3])
    assert torch.equal(read.read(indices), kept.read(indices))
    assert read.source == kept.source
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "dark" / "3.png")
    assert vit(folder).data.source.digest != kept.source.digest


def test_names_that_are_not_utf8(tmp_path):
    folder = pictures(tmp_path / "p", 2)
    (folder / "dark").rename(folder / os.fsdecode(b"\xff"))
    assert vit(folder).data.classes == ("bright", "\udcff")


def test_the_held_out_part_is_always_the_same(tmp_path):
    one, two = (vit(pictures(tmp_path / name)).data for name in ("p", "q"))
    assert torch.equal(one.held_out, two.held_out)
    assert not set(one.held_out.tolist()) & set(one.train.tolist())
    assert one.labels[one.held_out].tolist() == [0, 0, 1, 1]


def broken(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\nand no more")


def cut(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-900])


@pytest.mark.parametrize("make", [broken, cut, Path.touch], ids=["broken", "cut", "empty"])
def test_a_broken_picture_is_named(tmp_path, make):
    folder = pictures(tmp_path / "p", 2)
    make(folder / "dark" / "zz.png")
    with pytest.raises(InputError, match=r"p/dark/zz\.png can't be read as an image \(.+\)$"):
        vit(folder)


def test_folders_that_will_not_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="must be a folder with a subfolder of images for each class, but is a file"):
        vit(tmp_path / "file")
    with pytest.raises(InputError, match="for each class, but is not there"):
        vit(tmp_path / "absent")
    folder = pictures(tmp_path / "p", 2)
    (folder / "none").mkdir()
    with pytest.raises(InputError, match="class 'none' must have two images or more, one of them held out, but has 0"):
        vit(folder)
    (folder / "none").rmdir()
    Image.new("I;16", (9, 9)).save(folder / "dark" / "deep.png")
    with pytest.raises(InputError, match=r"deep.png must have 8 bits a channel, but has Pillow's mode I;16; convert it"):
        vit(folder)
    (tmp_path / "flat").mkdir()
    with pytest.raises(InputError, match="must have two classes or more, but has none"):
        vit(tmp_path / "flat")
    with pytest.raises(InputError, match="--image must be a multiple of --patch, but they are 8 and 3"):
        opening.task("vit", ViTConfig(image=8, patch=3), RECIPE, folder)


def test_digits_at_any_size():
    """Built-in images for a preset that reads larger ones in colour."""
    small, large = data.digit_pictures(), data.digit_pictures(32, 3)
    images = large.read(torch.arange(5))
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    pooled = torch.nn.functional.avg_pool2d(images[:, :1], 4)
    assert (pooled - small.read(torch.arange(5))).abs().mean() < 0.15
    assert torch.equal(small.labels, large.labels)
