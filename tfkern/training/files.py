"""A user's own data: a text file, a folder of images with a subfolder for each class, labelled sentences.

Whatever is wrong with a file is an InputError that names it, before anything is computed.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tfkern.ending import InputError
from tfkern.extras import require
from tfkern.models.tokens import Characters, Tokenizer, TokenizerError
from tfkern.training.data import Corpus, Pictures, Sentences, Source, digest

KEPT = 2**30  # bytes of decoded images that stay in memory


def text(path: Path) -> str:
    """A file's text, without a byte order mark. InputError unless it is UTF-8 and not empty."""
    try:
        found = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} must be a text file, but is a folder") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8, but has byte {error.object[error.start]:#04x} at {error.start}") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None
    if not found.strip():
        raise InputError(f"{path} must have some text, but is empty")
    return found


def corpus(path: Path, tokenizer: Tokenizer | None, specials: tuple[str, ...] = ()) -> Corpus:
    """A text file by a tokenizer, or by its characters and some special tokens."""
    found = text(path)
    try:
        return Corpus.of(found, tokenizer or Characters.of(found, specials), str(path.resolve()))
    except TokenizerError as error:
        raise InputError(f"{path}: {error}") from None


def sentences(path: Path, tokenizer: Tokenizer | None, specials: tuple[str, ...] = ()) -> Sentences:
    """Lines of label, tab, sentence; empty lines don't count."""
    found, pairs = text(path), []
    for number, line in enumerate(found.split("\n"), 1):  # splitlines() would split at form feeds and others, too
        if not line.strip():
            continue
        label, _, sentence = (part.strip() for part in line.partition("\t"))
        if not (label and sentence):
            raise InputError(f"{path}, line {number}, must be a label, a tab and a sentence, but is {line[:60]!r}")
        pairs.append((label, sentence))
    classes = tuple(sorted({label for label, _ in pairs}))
    numbers = {label: number for number, label in enumerate(classes)}
    labels = torch.tensor([numbers[label] for label, _ in pairs])
    tokenizer = tokenizer or Characters.of("".join(sentence for _, sentence in pairs), specials)
    try:
        ids = [tokenizer.encode(sentence) for _, sentence in pairs]
    except TokenizerError as error:
        raise InputError(f"{path}: {error}") from None
    parts = split(labels, classes, path, "sentences")
    return Sentences(tokenizer, classes, labels, ids, *parts, Source(str(path.resolve()), digest([found.encode()])))


def split(labels: Tensor, classes: Sequence[str], path: Path, what: str) -> tuple[Tensor, Tensor]:
    """(indices to train on, indices held out): a fifth of each class, at least one, always the same."""
    if len(classes) < 2:
        raise InputError(f"{path} must have two classes or more, but has {', '.join(classes) or 'none'}")
    train, held_out = [], []
    for number, name in enumerate(classes):
        own = (labels == number).nonzero()[:, 0]
        if len(own) < 2:
            raise InputError(f"{path}: class {name!r} must have two {what} or more, one of them held out, but has {len(own)}")
        own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))]
        cut = max(1, len(own) // 5)
        held_out.append(own[:cut])
        train.append(own[cut:])
    return torch.cat(train), torch.cat(held_out)


def pictures(folder: Path, size: int, channels: int) -> Pictures:
    """A folder with a subfolder of images for each class. Each image is decoded once here, so that a broken one shows."""
    extensions = set(require("PIL.Image", "demo").registered_extensions())
    if not folder.is_dir():
        raise InputError(f"{folder} must be a folder with a subfolder of images for each class, but is {_what(folder)}")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    paths, labels = [], []
    for number, name in enumerate(names):
        own = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in extensions and not p.name.startswith("."))
        paths += own
        labels += [number] * len(own)
    parts = split(torch.tensor(labels), names, folder, "images")
    read = Decoded(paths, size, channels)
    named = [*(os.fsencode(path.relative_to(folder)) for path in paths), *read.digests]
    return Pictures(tuple(names), torch.tensor(labels), read, *parts, Source(str(folder.resolve()), digest(named)))


def _what(path: Path) -> str:
    return "a file" if path.exists() else "not there"


class Decoded:
    """The images of files: called with indices (n,), it gives (n, channels, size, size) in [-1, 1].

    Those that fit into KEPT bytes stay in memory; the others are decoded anew each time.
    """

    def __init__(self, paths: Sequence[Path], size: int, channels: int):
        self.paths, self.size, self.channels = paths, size, channels
        self.kept: dict[int, Tensor] = {}
        room = KEPT // (channels * size * size)
        self.digests = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, image in enumerate(pool.map(self._decode, range(len(paths)))):
                self.digests.append(digest([image.numpy().tobytes()]).encode())
                if index < room:
                    self.kept[index] = image

    def __call__(self, indices: Tensor) -> Tensor:
        wanted = indices.tolist()
        missing = sorted(set(wanted) - self.kept.keys())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            fresh = dict(zip(missing, pool.map(self._decode, missing), strict=True))
        return scaled(torch.stack([self.kept[i] if i in self.kept else fresh[i] for i in wanted]))

    def _decode(self, index: int) -> Tensor:
        return picture(self.paths[index], self.size, self.channels)


def scaled(pixels: Tensor) -> Tensor:
    """0 … 255 to [-1, 1], as ViT is trained."""
    return pixels.float() / 127.5 - 1.0


def picture(path: Path, size: int, channels: int) -> Tensor:
    """A file's image as (channels, size, size) uint8: its shorter side scaled to size, the middle of the longer one cut out."""
    image_module, numpy = require("PIL.Image", "demo"), require("numpy", "demo")
    from PIL import ImageOps

    try:
        with image_module.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip these to 255
                raise InputError(f"{path} must have 8 bits a channel, but has Pillow's mode {image.mode}; convert it")
            upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            fitted = ImageOps.fit(upright, (size, size), image_module.Resampling.BICUBIC)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{path} can't be read as an image ({reason})") from None
    return torch.from_numpy(numpy.array(fitted)).view(size, size, channels).permute(2, 0, 1).contiguous()
