"""The parts of the pictures: figures with a line that names what computed them, maps over a sentence, curves and bars."""

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from tfkern.extras import require
from tfkern.models.ladder import looking, measures

SENTENCE = "attention is not too shabby"
PLAINER = "attention is shabby"
FOUR = ("attention is great", "attention is not great", "attention is shabby", "attention is not shabby")
WORDS = SENTENCE.split()
COLOURS = {"1": "tab:red", "1/√D": "tab:blue", "1/D": "tab:green", "1/T": "tab:orange"}  # of the scales
GOOD, BAD = "tab:blue", "tab:red"

trained = functools.cache(lambda name: measures.trained(name, seed=0)[0])


def plot(columns: int, size: tuple[float, float], title: str, by: str, **options):
    """A figure and its axes side by side, with a title and a line that names what computed it."""
    figure = require("matplotlib.figure", "demo").Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(f"computed by {by}", fontsize=7, color="dimgray", x=0.995, ha="right")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def heat(axes, values: Tensor, title: str, numbers: str = "", **scale):
    """A map over SENTENCE, query down and key across; with each number in its cell if a format is given."""
    image = axes.imshow(values.numpy(), **scale)
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(WORDS)), WORDS, fontsize=8, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(WORDS)), WORDS, fontsize=8)
    if numbers:
        for i, row in enumerate(values.tolist()):
            for j, value in enumerate(row):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                axes.text(
                    j, i, format(value, numbers), ha="center", va="center", fontsize=7, color="white" if dark else "black"
                )
    return image


def weights(axes, values: Tensor, title: str, most: float = 1.0):
    """A map of softmax weights, from 0 to `most`."""
    axes.set(xlabel="key: the word looked at", ylabel="query: the word that looks")
    return heat(axes, values, title, ".2f", cmap="magma", vmin=0, vmax=most)


def over_head_dims(axes, what: str, label: str, law: Callable[[float, int], float] | None = None):
    """A curve for each scale over D of what measures.deviations measured; law(scale, D) is dotted over it."""
    for name, colour in COLOURS.items():
        rows = [r for r in measures.deviations() if r.scale == name]
        dims = [r.head_dim for r in rows]
        axes.plot(dims, [getattr(r, what) for r in rows], marker="o", color=colour, label=name)
        if law:
            expected = [law(measures.SCALES[name](d, measures.TOKENS), d) for d in dims]
            axes.plot(dims, expected, color="black", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, dims, fontsize=8)
    axes.set(xlabel="head dim D", ylabel=label)


def logits(axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str]):
    """Bars of logits, each with its number."""
    bars = axes.barh(range(len(values)), [float(v) for v in values], color=colours)
    axes.bar_label(bars, [f"{value:+.2f}" for value in values], fontsize=8, padding=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.25)
    axes.set_yticks(range(len(names)), names, fontsize=8)


def contributions(axes, name: str, texts: Sequence[str]):
    """Bars of what each word adds to the logit, one axes a sentence, on one scale."""
    found = [looking.contributions(trained(name), text) for text in texts]
    most = 1.1 * max(values.abs().max().item() for values in found)
    for at, text, values in zip(axes, texts, found, strict=True):
        at.barh(range(len(values)), [float(v) for v in values], color=[GOOD if v > 0 else BAD for v in values])
        at.axvline(0, color="black", linewidth=0.8)
        at.set_xlim(-most, most)
        at.set_yticks(range(len(values)), text.split(), fontsize=9)
        at.invert_yaxis()
        at.set_xlabel("contribution to the logit")
        at.set_title(f"“{text}”\nlogit {values.sum():+.2f}", fontsize=9)


def stacked(axes, row: int, parts: Sequence[tuple[str, int, str]]) -> float:
    """A bar of (label, parameters, colour) end to end, in millions; its end."""
    left = 0.0
    for label, count, colour in parts:
        axes.barh(row, count / 1e6, 0.6, left=left, color=colour, label=label)
        left += count / 1e6
    return left
