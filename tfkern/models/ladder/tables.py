"""The tables of docs/ladder.md in Markdown, each with a line that names what computed it, and their insertion into the text."""

import re
from collections.abc import Sequence
from pathlib import Path

from tfkern.models.ladder import measures
from tfkern.models.ladder.measures import HEADS, PLAIN, TOKENS, WIDTH
from tfkern.models.ladder.sentiment import WEIGHT_DECAY

FORMULAS = {
    "each token": "X W, token by token", "a": "X Xᵀ X", "b": "(X W Xᵀ) X", "c": "Σ_j x_j Wv", "d": "Q Kᵀ V / √D",
    "e": "softmax(Q Kᵀ / √D) V", "f": f"a head of {WIDTH // HEADS}", "g": f"{HEADS} heads of {WIDTH // HEADS}, projection",
    "h": "the block", "f, full width": f"one head of {WIDTH}", "g, dropout": f"{HEADS} heads, projection, dropout 0.2",
}  # fmt: skip


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """A table and, under it, a line that names what computed it."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows)]
    return "\n".join([*lines, "", note])


def short(x: float) -> str:
    """Two digits, or all before the point."""
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def scale(rows: Sequence[measures.Deviation]) -> str:
    """Standard deviations of scores and outputs, from measures.deviations."""
    found = {(r.head_dim, r.scale): r for r in rows}
    parts = {"scores": "scores", "output of d": "summed", "output of e": "averaged"}
    headings = ["D", *(f"{part}, {name}" for part in parts for name in measures.SCALES)]
    cells = [
        [str(d), *(short(getattr(found[d, name], part)) for part in parts.values() for name in measures.SCALES)]
        for d in dict.fromkeys(r.head_dim for r in rows)
    ]
    note = f"Root mean squares at T = {TOKENS} tokens, 16 draws; scores and d computed by {PLAIN}, e by {measures.backend()}."
    return markdown(headings, cells, note)


def rungs(seeds: int) -> str:
    """What each rung learns of the sentences."""
    rows = []
    for name in ("each token", *"abcdefgh"):
        r, _ = measures.overfitting(name, seeds, WEIGHT_DECAY)
        rows.append([
            name, FORMULAS[name], f"{r.parameters:,}", f"{r.loss:.3f}", f"{r.right:.1%}", f"{r.held_out_loss:.3f}",
            f"{r.held_out_right:.1%} ± {r.deviation:.1%}",
        ])  # fmt: skip
    headings = ["rung", "f(X)", "parameters", "loss", "right", "held-out loss", "held-out right"]
    note = (
        f"Means over {seeds} seeds (± standard deviation); the first five computed by {PLAIN}, e to h by {measures.backend()}."
    )
    return markdown(headings, rows, note)


def heads(seeds: int) -> str:
    """Whether single heads overfit, and an ensemble of them less."""
    rows = []
    for decay, name in ((d, n) for d in (0.0, WEIGHT_DECAY) for n in ("f", "f, full width", "g", "g, dropout")):
        r, (loss, right) = measures.overfitting(name, seeds, decay)
        rows.append([
            f"{decay:g}", FORMULAS[name], f"{r.loss:.3f}", f"{r.right:.1%}", f"{r.held_out_loss:.3f}",
            f"{r.held_out_right:.1%} ± {r.deviation:.1%}", f"{loss:.3f}", f"{right:.1%}",
        ])  # fmt: skip
    alone = ["weight decay", "layer", "loss", "right", "held-out loss", "held-out right"]
    headings = [*alone, f"{seeds} together: held-out loss", f"{seeds} together: held-out right"]
    return markdown(headings, rows, f"Means over {seeds} seeds; computed by {measures.backend()}.")


def counts() -> str:
    """Parameters, counted from the models."""
    rows = [[name, f"{count:,}"] for name, count in measures.counts().items()]
    return markdown(["", "parameters"], rows, f"Elements of the parameters of `tfkern.models`, counted by {PLAIN}.")


def fill(path: Path, tables: dict[str, str]) -> None:
    """Put each table between its two marks, <!-- name --> and <!-- /name -->, in a text."""
    text = path.read_text("utf-8")
    for name, table in tables.items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(marks, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if found != 1:
            raise ValueError(f"text must have one place for the table {name!r}, but {path} has {found}; mark it")
    path.write_text(text, "utf-8")
