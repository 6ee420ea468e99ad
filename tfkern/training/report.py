"""The demo's report: the summary table, loss curves, attention maps of trained heads, and a sample of text."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tfkern import reference
from tfkern.training import data, sampling
from tfkern.training.tasks import Score
from tfkern.training.trainer import Training


@dataclass(frozen=True)
class Pair:
    """One task trained twice from the same seed, and what both reached."""

    name: str
    fused: Training
    naive: Training
    score: Score
    naive_score: Score

    @property
    def apart(self) -> float:
        """The largest distance between the two loss curves, in nats; NaN if a loss is."""
        return torch.tensor([self.fused.losses, self.naive.losses], dtype=torch.float64).diff(dim=0).abs().max().item()


HEADINGS = ("model", "parameters", "steps", "last loss", "held out", "fused", "naive", "curves apart")


def summary(pairs: dict[str, Pair]) -> list[tuple[str, ...]]:
    """A row a model, under HEADINGS."""
    return [
        (
            p.name, f"{sum(x.numel() for x in p.fused.model.parameters()):,}", str(p.fused.steps), f"{p.fused.losses[-1]:.3f}",
            p.score.name, str(p.score), str(p.naive_score), f"{p.apart:.1e}",
        )
        for p in pairs.values()
    ]  # fmt: skip


def write(folder: Path, pairs: dict[str, Pair], problems: list[str]) -> list[Path]:
    """Write the pictures, the sample and the figures; returns the paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    plots = {
        "loss.png": loss_curves(pairs),
        "attention-text.png": text_map(pairs["gpt"]),
        "attention-digit.png": digit_map(pairs["vit"]),
    }
    for name, figure in plots.items():
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
    written = sampling.continued(pairs["gpt"].fused, "The ", 300, temperature=0.7)
    (folder / "sample.txt").write_text(f"GPT writes:\n{written}\n\n{sampling.filled(pairs['bert'].fused)}\n", "utf-8")
    figures = {
        p.name: dict(
            steps=p.fused.steps, fused=p.fused.losses, naive=p.naive.losses, apart=p.apart, **{p.score.name: p.score.value}
        )
        for p in pairs.values()
    }
    (folder / "results.json").write_text(json.dumps(dict(problems=problems, **figures), indent=1), "utf-8")
    return [folder / name for name in (*plots, "sample.txt", "results.json")]


def loss_curves(pairs: dict[str, Pair]):
    """Both curves of each model in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6))
    for axes, p in zip(figure.subplots(1, len(pairs)), pairs.values(), strict=True):
        axes.plot(p.naive.losses, color="tab:orange", linewidth=3.5, alpha=0.55, label="naive")
        axes.plot(p.fused.losses, color="tab:blue", linewidth=1, label="fused")
        axes.set_title(f"{p.name}: {p.score.name} {p.score}\ncurves at most {p.apart:.1e} apart", fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats")
        axes.legend()
    figure.tight_layout()
    return figure


@contextlib.contextmanager
def weights_of(attn: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, a SelfAttention leaves its attention weights (B, H, Nq, Nk) in the list, one entry a call."""
    kept, inner = [], attn.attention

    def attention(query, key, value, dropout_p=0.0, **options):
        kept.append(reference.attention_weights(query, key, **options)[0])
        return inner(query, key, value, dropout_p=dropout_p, **options)

    attn.attention = attention
    try:
        yield kept
    finally:
        attn.attention = inner


def _sharpest_head(model: nn.Module, blocks, *inputs) -> tuple[int, int, Tensor]:
    """(layer, head, weights (Nq, Nk)) of the head that concentrates most beyond its nearest neighbours."""
    best = None
    for layer, block in enumerate(blocks):
        with torch.no_grad(), weights_of(block.attn) as kept:
            model(*inputs)
        for head, p in enumerate(kept[0][0].float().cpu()):
            near = sum(p.diagonal(-offset).sum() for offset in (0, 1))
            score = (p.square().sum() - near / 2) / p.shape[0]
            if best is None or score > best[0]:
                best = score, layer, head, p
    return best[1:]


def text_map(pair: Pair):
    """A head of the trained GPT over real text."""
    from matplotlib.figure import Figure

    corpus, length = data.corpus(), 48
    ids = corpus.held_out[:length]
    model = pair.fused.model.eval()
    layer, head, p = _sharpest_head(model, model.blocks, ids[None].to(pair.fused.device))
    characters = [c if c.isprintable() and c != " " else "·" for c in corpus.decode(ids)]
    figure = Figure(figsize=(8, 8))
    axes = figure.subplots()
    axes.imshow(p.sqrt().numpy(), cmap="magma")
    axes.set_xticks(range(length), characters, fontsize=7)
    axes.set_yticks(range(length), characters, fontsize=7)
    axes.set_xlabel("key: the character looked at")
    axes.set_ylabel("query: the character that looks")
    axes.set_title(f"GPT, layer {layer + 1}, head {head + 1}: attention (square root) over held-out text")
    return figure


def digit_map(pair: Pair):
    """Where the class token of the trained ViT looks in some digits, for one head."""
    from matplotlib.figure import Figure

    count = 5
    images, labels = (x[:count] for x in data.digits()[1])
    model = pair.fused.model.eval()
    device = pair.fused.device
    layer, head, _ = _sharpest_head(model, model.blocks, images[:1].to(device))
    with torch.no_grad(), weights_of(model.blocks[layer].attn) as kept:
        read = model(images.to(device)).argmax(-1).cpu()
    side = model.config.image // model.config.patch
    maps = kept[0][:, head, 0, 1:].reshape(count, side, side).float().cpu()
    figure = Figure(figsize=(2.2 * count, 4.8))
    for column, (top, bottom) in enumerate(zip(*figure.subplots(2, count), strict=True)):
        top.imshow(images[column, 0].numpy(), cmap="gray_r")
        top.set_title(f"a {labels[column]}, read as {read[column]}", fontsize=9)
        bottom.imshow(maps[column].sqrt().numpy(), cmap="magma", extent=(0, side, side, 0))
        bottom.contour(
            images[column, 0].numpy(), levels=[0.0], colors="white", linewidths=1, extent=(0, side, 0, side), origin="lower"
        )
        for axes in (top, bottom):
            axes.set_axis_off()
    figure.suptitle(f"ViT, layer {layer + 1}, head {head + 1}: attention of the class token (square root)")
    return figure
