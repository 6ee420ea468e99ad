"""Real data without downloads: English from the standard library, handwritten digits from scikit-learn."""

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tfkern.extras import require


@dataclass(frozen=True)
class Corpus:
    """A text as character ids: the first 90 % to train on, the rest held out."""

    characters: str
    train: Tensor
    held_out: Tensor

    @property
    def vocabulary(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Ids of a text, (len(text),) int64. ValueError for a character that the corpus does not have."""
        if unknown := sorted(set(text) - set(self.characters)):
            raise ValueError(f"the text has characters {unknown} that the corpus has not; it has {self.characters!r}")
        return torch.tensor([self.characters.index(c) for c in text])

    def decode(self, ids) -> str:
        return "".join(self.characters[int(i)] for i in ids)

    def windows(self, part: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
        """(count, length) ids, each row a stretch from a random place of a part."""
        starts = torch.randint(len(part) - length + 1, (count,), generator=generator)
        return part[starts[:, None] + torch.arange(length)]


@functools.cache
def corpus() -> Corpus:
    """`pydoc_data.topics`: the Python language reference as plain English, without its tables and indentation."""
    from pydoc_data.topics import topics

    lines = (line for name in sorted(topics) for line in topics[name].splitlines() if not line.lstrip().startswith(("+", "|")))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in lines))
    characters = "".join(sorted(set(text)))
    index = {c: i for i, c in enumerate(characters)}
    ids = torch.tensor([index[c] for c in text])
    cut = len(ids) * 9 // 10
    return Corpus(characters, ids[:cut], ids[cut:])


@functools.cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, the same held out) of scikit-learn's digits: (n, 1, 8, 8) in [-1, 1], and 0..9."""
    loaded = require("sklearn.datasets", "demo").load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(order) * 4 // 5
    return (images[order[:cut]], labels[order[:cut]]), (images[order[cut:]], labels[order[cut:]])
