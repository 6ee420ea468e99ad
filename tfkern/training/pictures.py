"""The demo's pictures: loss curves and their differences, and attention maps of trained heads. Each names who computed it."""

from pathlib import Path

import torch
from torch import Tensor

from tfkern import reference
from tfkern.training import data, provenance
from tfkern.training.classifying import ReadImages
from tfkern.training.report import Comparison, Run
from tfkern.training.tasks import FillIn, LearnText

TITLES = {"gpt": "GPT", "bert": "BERT", "vit": "ViT", "tiny gpt": "Tiny GPT"}
PREDICTED = {LearnText: "character", FillIn: "masked character", ReadImages: "image"}
LINES = (  # of the runs of a comparison; naive is wide, so that others show upon it
    dict(color="tab:orange", linewidth=4, alpha=0.55),
    dict(color="tab:blue", linewidth=1.6),
    dict(color="black", linewidth=1.6, linestyle=(0, (2, 3))),
)
DIGITS = 5


def write(folder: Path, comparisons: dict[str, Comparison], seed: int) -> list[Path]:
    """Draw everything; returns the paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    plots = draw(comparisons, seed)
    for name, figure in plots.items():
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
    return [folder / name for name in plots]


def draw(comparisons: dict[str, Comparison], seed: int) -> dict:
    """The figures by the names of their files, who computed them below each."""
    gpt, vit = comparisons["gpt"].shown, comparisons["vit"].shown
    everyone = [run for c in comparisons.values() for run in c.runs]
    plots = {
        "loss.png": (loss_curves(comparisons), everyone, "steps whose losses are equal have no point on the log axis"),
        "attention-text.png": (text_map(gpt), [gpt], _of_weights(gpt)),
        "attention-digit.png": (digit_map(vit), [vit], _of_weights(vit)),
    }
    for figure, runs, note in plots.values():
        computed_by = provenance.computed_by([run.backend for run in runs], runs[0].training.device, seed)
        figure.text(0.5, -0.01, f"{computed_by}\n{note}", ha="center", va="top", fontsize=8, color="dimgray")
    return {name: figure for name, (figure, *_) in plots.items()}


def _of_weights(run: Run) -> str:
    """How the weights of a map came to be."""
    return f"after {run.training.steps} steps; weights written out by tfkern.reference from the queries and keys of the model"


def loss_curves(comparisons: dict[str, Comparison]):
    """The loss curves of each comparison, and below them how far each is from the naive one, on one log axis for all."""
    figure = _figure(11, 10)
    blocks = figure.subfigures(2, 2, hspace=0.04).flat
    for block, c in zip(blocks, comparisons.values(), strict=True):
        curves, differences = block.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        steps = range(1, c.losses.shape[1] + 1)
        for run, losses, line in zip(c.runs, c.losses, LINES, strict=False):
            curves.plot(steps, losses, **line, label=run.by)
        differences.set(yscale="log", ylim=(1e-8, 10), xlabel="step", ylabel="difference\n(nats)")
        for run, distances, line in zip(c.runs[1:], c.from_naive, LINES[1:], strict=False):
            name = f"|{run.by} - naive|, at most {distances.max():.1e}"
            shown = distances.where(distances > 0, torch.nan)  # a log axis has no 0
            differences.plot(steps, shown, color=line["color"], marker=".", markersize=3, linestyle="", label=name)
        differences.axhline(c.bound, color="tab:red", linestyle="--", linewidth=1, label=f"bound, {c.bound:g}")
        unit = f"nats per {PREDICTED[type(c.runs[0].training.task)]}"
        curves.set_title(_title(c), fontsize=10)
        curves.set_ylabel(f"training loss\n({unit})")
        for axes in (curves, differences):
            axes.legend(fontsize=8, loc="upper right")
        block.align_ylabels()
    return figure


def _title(c: Comparison) -> str:
    run = c.runs[-1]
    parameters = sum(x.numel() for x in run.training.model.parameters())
    return f"{TITLES[c.name]}, {parameters:,} parameters\n{run.score.name} {run.score} ({run.by})"


def weights_of(run: Run, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Attention weights (layers, B, H, N, N) of a trained model, and its results."""
    model = run.training.model.eval()
    with torch.no_grad(), provenance.calls_of(model) as calls:
        results = model(inputs.to(run.training.device))
        weights = [reference.attention_weights(c.query, c.key, **_scores(c.options))[0] for c in calls]
    return torch.stack(weights).float().cpu(), results.cpu()


def _scores(options: dict) -> dict:
    """The options of a call that its weights before dropout depend on."""
    return {name: value for name, value in options.items() if name != "dropout_p"}


def sharpest(weights: Tensor) -> tuple[int, int]:
    """(layer, head) of the highest mean over queries of the sum of squared weights (layers, B, H, Nq, Nk)."""
    scores = weights.square().sum(-1).mean((1, 3))
    return divmod(scores.argmax().item(), scores.shape[1])


def text_map(run: Run):
    """A head of the trained GPT over real text."""
    corpus, length = data.corpus(), 48
    ids = corpus.held_out[:length]
    weights, _ = weights_of(run, ids[None])
    layer, head = sharpest(weights.tril(-2))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shown = weights[layer, 0, head].masked_fill(future, torch.nan)
    characters = [c if c.isprintable() and c != " " else "·" for c in corpus.decode(ids)]
    figure = _figure(9, 8)
    axes = figure.subplots()
    image = axes.imshow(shown.numpy(), **_square_root(1.0))
    axes.set_xticks(range(length), characters, fontsize=8)
    axes.set_yticks(range(length), characters, fontsize=8)
    axes.set_xlabel("key: the character attended to (· is a space)")
    axes.set_ylabel("query: the character that attends")
    axes.set_title(
        f"GPT, layer {layer + 1}, head {head + 1}, over held-out text: of its {_heads(weights)} heads\n"
        "the sharpest beyond a character's own place and the one before (highest mean Σ weight² there)",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, label="attention weight (colours by its square root); gray: not seen", shrink=0.8)
    return figure


def digit_map(run: Run):
    """Where the class token of the trained ViT attends in some digits, for one head, on one scale."""
    images, labels = data.digits()[1]
    weights, logits = weights_of(run, images)
    to_patches = weights[:, :, :, :1, 1:]
    layer, head = sharpest(to_patches)
    config = run.training.model.config
    side, pixels = config.image // config.patch, config.image
    maps, read = to_patches[layer, :DIGITS, head, 0].reshape(DIGITS, side, side), logits.argmax(-1)
    figure = _figure(2.2 * DIGITS, 5.2)
    digits, attended = figure.subplots(2, DIGITS)
    scale = _square_root(maps.max().item())
    for column, (top, bottom) in enumerate(zip(digits, attended, strict=True)):
        picture = (images[column, 0].numpy() + 1) * 8
        ink = top.imshow(picture, cmap="gray_r", vmin=0, vmax=16, extent=(0, pixels, pixels, 0))
        top.set_title(f"a {labels[column]}, read as {read[column]}", fontsize=10)
        image = bottom.imshow(maps[column].numpy(), **scale, extent=(0, pixels, pixels, 0))
        bottom.contour(picture, levels=[8], colors="white", linewidths=1, extent=(0, pixels, 0, pixels), origin="lower")
        bottom.set_title(f"{maps[column].sum():.0%} on patches", fontsize=10)
        for axes in (top, bottom):
            axes.set(xticks=[0, pixels // 2, pixels], yticks=[0, pixels // 2, pixels])
            axes.tick_params(labelsize=8, labelbottom=axes is bottom, labelleft=column == 0)
    digits[0].set_ylabel("pixel row")
    attended[0].set_ylabel("pixel row")
    attended[DIGITS // 2].set_xlabel("pixel column")
    figure.colorbar(ink, ax=digits, label="ink, 0 to 16", ticks=[0, 8, 16], shrink=0.85)
    figure.colorbar(image, ax=attended, label="attention weight\n(colours by its square root)", shrink=0.85)
    figure.suptitle(
        f"ViT, layer {layer + 1}, head {head + 1}: attention of the class token to patches, the digit's outline in white\n"
        f"of its {_heads(weights)} heads the sharpest (highest mean Σ weight² over {len(images)} held-out digits)",
        fontsize=10,
    )
    return figure


def _heads(weights: Tensor) -> int:
    return weights.shape[0] * weights.shape[2]


def _square_root(most: float) -> dict:
    """How a map of weights from 0 to `most` is coloured: small ones are told apart, and the colour bar has the weights."""
    import matplotlib as mpl
    from matplotlib.colors import PowerNorm

    return dict(cmap=mpl.colormaps["magma"].with_extremes(bad="0.85"), norm=PowerNorm(0.5, vmin=0.0, vmax=most))


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
