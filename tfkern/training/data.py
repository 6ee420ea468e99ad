"""What is trained on: texts, images with classes, labelled sentences; and real data without downloads.

The built-in text is English from Python's standard library, the built-in images are handwritten digits from scikit-learn.
tfkern/training/files.py reads a user's own.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tfkern.extras import require
from tfkern.models.tokens import Characters, Tokenizer


@dataclass(frozen=True)
class Source:
    """Where data came from, and what it was: a training goes on with the same data only."""

    path: str | None  # None is built-in
    digest: str


@dataclass(frozen=True)
class Corpus:
    """A text as token ids: the first 90 % to train on, the rest held out."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor
    source: Source

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer, path: str | None = None) -> "Corpus":
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
        cut = len(ids) * 9 // 10
        return cls(tokenizer, ids[:cut], ids[cut:], Source(path, digest([text.encode()])))

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids)

    def windows(self, part: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
        """(count, length) ids, each row a stretch from a random place of a part."""
        starts = torch.randint(len(part) - length + 1, (count,), generator=generator)
        return part[starts[:, None] + torch.arange(length)]


@dataclass(frozen=True)
class Pictures:
    """Images with classes. `read` turns indices (n,) into images (n, channels, size, size) in [-1, 1]."""

    classes: tuple[str, ...]
    labels: Tensor
    read: Callable[[Tensor], Tensor]
    train: Tensor  # indices
    held_out: Tensor
    source: Source


@dataclass(frozen=True)
class Sentences:
    """Sentences with classes, as token ids of any lengths."""

    tokenizer: Tokenizer
    classes: tuple[str, ...]
    labels: Tensor
    ids: list[list[int]]
    train: Tensor  # indices
    held_out: Tensor
    source: Source


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of parts, one behind the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def text() -> str:
    """`pydoc_data.topics`: the Python language reference as plain English, without its tables and indentation."""
    from pydoc_data.topics import topics

    lines = (line for name in sorted(topics) for line in topics[name].splitlines() if not line.lstrip().startswith(("+", "|")))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in lines))


@functools.cache
def corpus(specials: tuple[str, ...] = ()) -> Corpus:
    """The built-in text, character by character."""
    return Corpus.of(text(), Characters.of(text(), specials))


@functools.cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, the same held out) of scikit-learn's digits: (n, 1, 8, 8) in [-1, 1], and 0..9."""
    loaded = require("sklearn.datasets", "demo").load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(order) * 4 // 5
    return (images[order[:cut]], labels[order[:cut]]), (images[order[cut:]], labels[order[cut:]])


@functools.cache
def digit_pictures(size: int = 8, channels: int = 1) -> Pictures:
    """The digits, scaled to a model's images."""
    (images, labels), (held_images, held_labels) = digits()
    images, count = torch.cat([images, held_images]), len(images)
    named = digest(x.contiguous().numpy().tobytes() for x in (images, labels, held_labels))

    def read(indices: Tensor) -> Tensor:
        chosen = images[indices]
        if size != chosen.shape[-1]:
            chosen = F.interpolate(chosen, (size, size), mode="bilinear", antialias=True)
        return chosen.expand(-1, channels, -1, -1)

    indices = torch.arange(len(images))
    return Pictures(
        tuple("0123456789"), torch.cat([labels, held_labels]), read, indices[:count], indices[count:], Source(None, named)
    )
