"""The pictures and tables of docs/ladder.md: python -m tfkern.models.ladder.pictures --out docs/ladder --text docs/ladder.md

Each picture says what computed it. --only draws some of them, --seeds sets how many trainings the measured ones average over.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tfkern.extras import require
from tfkern.models import ladder
from tfkern.models.ladder import drawing, looking, measures, sentiment, tables
from tfkern.models.ladder.drawing import BAD, FOUR, GOOD, PLAINER, SENTENCE, WORDS, heat, plot, trained
from tfkern.models.ladder.measures import HEADS, PLAIN, TOKENS, WIDTH


def drawn(width: int = 16) -> Tensor:
    """Embeddings (1, N, width) of the sentence's words, drawn at random, of length about 1."""
    return torch.randn(1, len(WORDS), width, generator=torch.Generator().manual_seed(0)) / width**0.5


def a_products():
    """Who learns of whom, and what it costs."""
    x = drawn()
    torch.manual_seed(0)
    layers = {
        "one layer over all tokens": ladder.AllTokens(*x.shape[1:]),
        "one layer over the embedding": ladder.EachToken(x.shape[2]),
        "X Xᵀ X": ladder.Products(),
    }
    figure, axes = plot(4, (13, 3.6), "Rung a: three ways from X to a new X", PLAIN, width_ratios=[1, 1, 1, 1.3])
    for at, (name, layer) in zip(axes, layers.items(), strict=False):
        jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0]  # (N, C, N, C)
        size = jacobian.square().sum((1, 3)).sqrt()
        image = heat(at, size / size.max(), name, cmap="magma", vmin=0, vmax=1)
        at.set_xlabel("token $j$ of X")
    axes[0].set_ylabel("token $i$ of f(X)")
    figure.colorbar(image, ax=list(axes[:3]), label=r"$\|\partial f_i\,/\,\partial x_j\|$, largest = 1", shrink=0.8)
    tokens = torch.tensor([8, 32, 128, 512, 2048])
    axes[3].loglog(tokens, (768.0 * tokens) ** 2, marker="o", label="all tokens: (N C)²")
    axes[3].loglog(tokens, torch.full(tokens.shape, 768.0**2), marker="o", label="the embedding: C²")
    axes[3].axhline(measures.counts()["twelve blocks"], color="gray", linestyle=":", label="twelve whole blocks (rung h)")
    axes[3].set(xlabel="tokens N", ylabel="parameters")
    axes[3].set_title("C = 768; X Xᵀ X has none", fontsize=9)
    axes[3].legend(fontsize=7)
    return figure


def b_inner_product():
    """Scores with and without W, and how far queries and keys are from W."""
    x = drawn()
    torch.manual_seed(0)
    before = ladder.QueriesKeysValues(x.shape[2], scale=1.0)
    layer = ladder.InnerProduct.of(before.query, before.key)
    with torch.no_grad():
        maps = ladder.Products().scores(x)[0], layer.scores(x)[0], before.scores(x)[0]
    figure, axes = plot(3, (11.5, 4.1), "Rung b: what the inner product looks at (random embeddings and W)", PLAIN)
    most = max(m.abs().max().item() for m in maps)
    for at, values, name in zip(axes, maps, ("X Xᵀ: symmetric", "X W Xᵀ: need not be"), strict=False):
        image = heat(at, values, name, "+.1f", cmap="RdBu_r", vmin=-most, vmax=most)
    figure.colorbar(image, ax=list(axes[:2]), label="score", shrink=0.8)
    apart = (maps[1] - maps[2]).abs().clamp_min(1e-9)
    scale = require("matplotlib.colors", "demo").LogNorm(1e-9, 1e-5)
    image = heat(axes[2], apart, "X W Xᵀ and (X Wq)(X Wk)ᵀ, W = Wq Wkᵀ", cmap="viridis", norm=scale)
    figure.colorbar(image, ax=axes[2], label="how far the scores are apart (1e-9 or less)", shrink=0.8)
    for at in axes:
        at.set_xlabel("token $j$")
    axes[0].set_ylabel("token $i$")
    return figure


def c_values():
    """Four sentences that no additive function can tell."""
    by = f"{PLAIN} (c), {measures.backend()} (g)"
    figure, axes = plot(2, (10, 3.9), "Rung c: values only, summed, can't learn what “not” does", by, sharey=True)
    for at, name in zip(axes, ("c", "g"), strict=True):
        great, not_great, shabby, not_shabby = values = trained(name).logits(FOUR).tolist()
        drawing.logits(at, FOUR, values, [GOOD, BAD, BAD, GOOD])
        sums = f"great + not shabby: {great + not_shabby:+.2f}; shabby + not great: {shabby + not_great:+.2f}"
        at.set_title(f"rung {name}: {tables.FORMULAS[name]}\n{sums}", fontsize=9)
        at.set_xlabel("logit (blue should be above 0, red below)")
    axes[0].invert_yaxis()
    return figure


def d_scale():
    """Standard deviations over D."""
    by = f"{PLAIN} (scores, rung d), {measures.backend()} (rung e)"
    title = f"Rung d: what the scale does to x of standard deviation 1, T = {TOKENS} tokens; dotted: the formula above"
    figure, axes = plot(3, (12, 4), title, by)
    drawing.over_head_dims(axes[0], "scores", "scores, standard deviation", lambda scale, d: scale * d**0.5)
    summed = "output of d, standard deviation"
    drawing.over_head_dims(axes[1], "summed", summed, lambda scale, d: scale * (TOKENS * (TOKENS + d)) ** 0.5)
    drawing.over_head_dims(axes[2], "averaged", "output of e, standard deviation")
    axes[2].axhline((math.e / TOKENS) ** 0.5, color="black", linestyle=":", linewidth=1)
    for at, law in zip(axes, ("scale · √D", "scale · √(T² + T D)", "√(e / T), for 1/√D and large D"), strict=True):
        at.set_title(law, fontsize=9)
        at.set_yscale("log")
    axes[0].set_ylim(0.005)
    axes[0].legend(title="scale", fontsize=7, ncols=4, loc="lower center")
    return figure


def e_softmax():
    """Scores become weights; and what softmax does to scores that are too large or too small."""
    model = trained("e")
    with torch.no_grad():
        scores = model.layer.scores(model.words(sentiment.encode([SENTENCE])[0]))[0]
    title = "Rung e: softmax. Left: the classifier of sentences with this rung; right: random input, as for rung d"
    figure, axes = plot(4, (15, 4.3), title, measures.backend(), width_ratios=[1.1, 1.1, 1, 1])
    most = scores.abs().max().item()
    image = heat(axes[0], scores, "scores Q Kᵀ / √D", "+.1f", cmap="RdBu_r", vmin=-most, vmax=most)
    axes[0].set(xlabel="key: the word looked at", ylabel="query: the word that looks")
    figure.colorbar(image, ax=axes[0], label="score", shrink=0.75)
    image = drawing.weights(axes[1], looking.maps(model, SENTENCE)[0], "weights: each row's sum is 1")
    figure.colorbar(image, ax=axes[1], label="weight", shrink=0.75)
    drawing.over_head_dims(axes[2], "largest", "largest weight of a row, mean")
    drawing.over_head_dims(axes[3], "gradient", "norm of dScores / norm of dOutput")
    axes[2].legend(title="scale", fontsize=8)
    for at in axes[2:]:
        at.set_ylim(0)
    return figure


def f_head():
    """The one head of a trained classifier."""
    title = f"Rung f: one head of {WIDTH // HEADS} numbers, trained on the sentences"
    figure, axes = plot(3, (12, 3.9), title, measures.backend())
    drawing.contributions(axes[:2], "f", [PLAINER, SENTENCE])
    image = drawing.weights(axes[2], looking.maps(trained("f"), SENTENCE)[0], "weights of the head")
    figure.colorbar(image, ax=axes[2], label="weight", shrink=0.8)
    return figure


def g_heads(seeds: int):
    """All heads of a trained classifier on one scale; and whether more heads overfit less."""
    title = f"Rung g: {HEADS} heads of {WIDTH // HEADS} numbers, trained on the sentences: all of them, seed 0"
    figure, axes = plot(HEADS + 1, (17, 4), title, measures.backend(), width_ratios=[1] * HEADS + [1.7])
    for head, values in enumerate(looking.maps(trained("g"), SENTENCE)):
        image = drawing.weights(axes[head], values, f"head {head + 1}")
        if head:
            axes[head].set_ylabel("")
            axes[head].tick_params(labelleft=False)
    figure.colorbar(image, ax=list(axes[:HEADS]), label="weight", shrink=0.8)
    last, names = axes[HEADS], ("f", "f, full width", "g", "g, dropout")
    found = [measures.overfitting(name, seeds, 0.0) for name in names]
    points = {
        "trained on": ([r.loss for r, _ in found], "tab:gray"),
        "held out": ([r.held_out_loss for r, _ in found], "tab:orange"),
        f"held out, mean logit of {seeds}": ([together[0] for _, together in found], "tab:green"),
    }
    for label, (values, colour) in points.items():
        last.plot(values, range(len(names)), "o", label=label, color=colour)
    last.set_yticks(range(len(names)), [tables.FORMULAS[name] for name in names], fontsize=8)
    last.set_ylim(len(names) - 0.5, -0.5)
    last.grid(axis="y", linestyle=":")
    last.set_xscale("log")
    last.set_xlabel("loss, nats")
    last.set_title(f"means over {seeds} seeds, no weight decay", fontsize=9)
    last.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


def h_block():
    """Where the parameters are."""
    counts = measures.counts()
    figure, (block, models) = plot(2, (13, 3.4), "Rung h: parameters of the models", f"{PLAIN}, counting")
    parts = ("queries, keys, values", "projection", "MLP", "two norms")
    drawing.stacked(block, 0, [(f"{part}: {counts[part]:,}", counts[part], f"C{i}") for i, part in enumerate(parts)])
    block.set_ylim(-0.6, 2)
    block.set_yticks([0], ["block"])
    block.set_title(f"a block, C = 768: {counts['block']:,}", fontsize=9)
    block.legend(fontsize=8, loc="upper left")
    names = {"BERT-base": "embeddings", "GPT-2 small": "embeddings", "ViT-B/16": "patches and positions"}
    for row, (name, first) in enumerate(names.items()):
        embeddings = counts[f"{name}, {first}"]
        rest = counts[name] - counts["twelve blocks"] - embeddings
        shares = [("twelve blocks", counts["twelve blocks"], "C5"), ("embeddings", embeddings, "C6"), ("the rest", rest, "C7")]
        end = drawing.stacked(models, row, [(label if row == 0 else "", *share) for label, *share in shares])
        models.text(end + 1, row, f"{counts[name]:,}", va="center", fontsize=8)
    models.set_yticks(range(len(names)), names)
    models.invert_yaxis()
    models.set_xlim(0, 200)
    models.legend(fontsize=8, loc="center right")
    models.set_title("three models of twelve such blocks", fontsize=9)
    for at in (block, models):
        at.set_xlabel("million parameters")
    return figure


def sentiment_block():
    """What "not" does to "shabby" in the trained block: contributions, a head, and the logit with connections cut."""
    model = trained("h")
    maps = looking.maps(model, SENTENCE)
    head = maps[:, WORDS.index("shabby"), WORDS.index("not")].argmax().item()
    title = "Rung h, a block trained on the sentences: “not” acts on “shabby”"
    figure, axes = plot(4, (16, 4), title, measures.backend(), width_ratios=[1, 1, 1.1, 1.2])
    drawing.contributions(axes[:2], "h", [PLAINER, SENTENCE])
    name = f"head {head + 1}: of all, most weight from “shabby” to “not”"
    image = drawing.weights(axes[2], maps[head], name, maps.max().item())
    figure.colorbar(image, ax=axes[2], label="weight", shrink=0.8)
    cuts = {
        "all see all": [],
        "“shabby” can't see “not”": [("shabby", "not")],
        "“not” can't see “shabby”": [("not", "shabby")],
        "neither sees the other": [("shabby", "not"), ("not", "shabby")],
        "no other word sees “not”": [(word, "not") for word in WORDS if word != "not"],
    }
    values = [looking.logit_hiding(model, SENTENCE, pairs) for pairs in cuts.values()]
    drawing.logits(axes[3], list(cuts), values, [GOOD if value > 0 else BAD for value in values])
    axes[3].invert_yaxis()
    axes[3].set_title("words hidden from each other in all heads", fontsize=9)
    axes[3].set_xlabel("logit of the sentence")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures into --out, print the tables, and put them into --text."""
    parser = argparse.ArgumentParser(description="The pictures and tables of docs/ladder.md.")
    parser.add_argument("--out", type=Path, default=Path("docs/ladder"), help="folder of the pictures")
    parser.add_argument("--text", type=Path, help="a text with places for the tables, such as docs/ladder.md")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each layer that measured tables average over")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of pictures and tables")
    args = parser.parse_args(arguments)
    pictures: dict[str, Callable] = {
        "a": a_products, "b": b_inner_product, "c": c_values, "d": d_scale, "e": e_softmax, "f": f_head,
        "g": lambda: g_heads(args.seeds), "h": h_block, "sentiment": sentiment_block,
    }  # fmt: skip
    texts: dict[str, Callable[[], str]] = {
        "scale": lambda: tables.scale(measures.deviations()), "rungs": lambda: tables.rungs(args.seeds),
        "heads": lambda: tables.heads(args.seeds), "counts": tables.counts,
    }  # fmt: skip
    if unknown := sorted(set(args.only or ()) - set(pictures) - set(texts)):
        parser.error(f"--only takes names of {', '.join([*pictures, *texts])}, but has {', '.join(unknown)}")
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    args.out.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in args.only or [*pictures, *texts]:
        start = time.perf_counter()
        if name in pictures:
            pictures[name]().savefig(args.out / f"{name}.png", dpi=110)
            print(f"wrote {args.out / name}.png in {time.perf_counter() - start:.1f} s", flush=True)
        else:
            written[name] = texts[name]()
            print(f"\n{name}, in {time.perf_counter() - start:.1f} s\n\n{written[name]}\n", flush=True)
    if args.text:
        tables.fill(args.text, written)


if __name__ == "__main__":
    main()
