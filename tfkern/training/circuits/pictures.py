"""The pictures of docs/circuits.md. Each names what computed it; maps that are compared share one scale."""

import math
from pathlib import Path

import torch
from torch import Tensor

from tfkern.training.circuits import heads
from tfkern.training.circuits.report import chance, named
from tfkern.training.circuits.runs import Run, ablated, ideals, token_losses

COLOURS = ("tab:gray", "tab:orange", "tab:blue")  # of models with 0, 1 and 2 layers
TOKENS = ("key's token", "query's token")


def write(folder: Path, runs: list[Run], computed_by: str) -> list[Path]:
    """Draw everything of the models of 0, 1 and 2 layers; returns the paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    _, one, two = runs
    plots = {
        "loss.png": loss(runs), "heads.png": scores(one, two), "patterns.png": patterns(one, two),
        "circuits.png": circuits(one, two), "composition.png": composition(two), "ablation.png": ablation(one, two),
    }  # fmt: skip
    for name, figure in plots.items():
        figure.text(0.5, -0.01, computed_by, ha="center", va="top", fontsize=7, color="dimgray")
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
    return [folder / name for name in plots]


def loss(runs: list[Run]):
    """Loss in the repeat, elsewhere, the difference that the second layer makes, and loss by position."""
    figure = _figure(11, 6.4)
    inside, outside, difference, by_position = figure.subplots(2, 2).flat
    guessing = math.log(runs[0].task.vocab_size)
    highest = 1.05 * max(max(p.inside, p.outside) for run in runs for p in run.points)
    any_seen, looked_up = ideals(runs[0].task)
    inside.axhline(any_seen, color="black", linestyle="-.", linewidth=1, label="any token seen so far")
    inside.axhline(looked_up, color="black", linestyle="--", linewidth=1, label="perfect induction head")
    for axes, title, what in ((inside, "inside the repeat", "inside"), (outside, "elsewhere", "outside")):
        for run, colour in zip(runs, COLOURS, strict=True):
            axes.plot(_steps(run), [getattr(p, what) for p in run.points], color=colour, label=_layers(run))
        axes.axhline(guessing, color="black", linestyle=":", linewidth=1, label=f"guessing, ln {runs[0].task.vocab_size}")
        axes.set(title=f"held-out loss {title}", xlabel="training step", ylabel="loss, nats per token", ylim=(0, highest))
        axes.legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.28))
    _, one, two = runs
    apart = [abs(a.inside - b.inside) for a, b in zip(one.points, two.points, strict=True)]
    difference.semilogy(_steps(two), apart, color="black")
    difference.set(
        title="inside the repeat: what the second layer changes",
        xlabel="training step",
        ylabel="|1 layer minus 2 layers|, nats",
    )
    period = sum((two.task.shortest, two.task.longest)) // 2
    for run, colour in zip(runs, COLOURS, strict=True):
        by_position.plot(range(1, two.task.context + 1), _by_position(run, period), color=colour, label=_layers(run))
    by_position.axvline(period, color="black", linestyle=":", linewidth=1, label="the repeat begins")
    by_position.set(title=f"by position, period {period}, after training", xlabel="position of the token predicted")
    by_position.set(ylabel="loss, nats per token", ylim=(0, None))
    by_position.legend(fontsize=8)
    return figure


def _by_position(run: Run, period: int, rows: int = 512) -> Tensor:
    """(N,) mean losses of held-out sequences of one period."""
    task = run.task
    block = torch.randint(task.vocab_size, (rows, period), generator=torch.Generator().manual_seed(-2))
    with torch.no_grad():
        return token_losses(run.model, block[:, torch.arange(task.context + 1) % period]).mean(0)


def scores(one: Run, two: Run):
    """Three scores of every head over training: a row a score, a column a layer."""
    figure = _figure(11, 8)
    grid = figure.subplots(3, 3, sharex=True, sharey="row")
    columns = ((one, 0, "1 layer (control)"), (two, 0, "2 layers: the first"), (two, 1, "2 layers: the second"))
    rows = (
        ("previous", "previous-token score,\nshare of attention", (0, 1)),
        ("prefix", "prefix-matching score,\nshare of attention", (0, 1)),
        ("copying", "copying score,\nΣ eigenvalues / Σ |eigenvalues|", (-1, 1)),
    )
    for line, (score, label, limits) in zip(grid, rows, strict=True):
        for axes, (run, layer, title) in zip(line, columns, strict=True):
            for number in range(run.task.heads):
                values = [getattr(p, score)[layer, number].item() for p in run.points]
                axes.plot(_steps(run), values, label=f"head {named((layer, number))}")
            low, high = limits
            axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
            axes.axhline(0, color="black", linewidth=0.5)
            if score == "previous":
                axes.set_title(title)
                axes.legend(fontsize=8, loc="upper left")
            if score == "prefix":
                alike = axes.axhline(chance(two), color="black", linestyle=":", linewidth=1)
                axes.legend([alike], ["looking everywhere alike"], fontsize=8, loc="center right")
        line[0].set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    return figure


def patterns(one: Run, two: Run):
    """Where three heads look in one sequence."""
    ids, periods = two.task.held_out()
    row = int((periods == sum((two.task.shortest, two.task.longest)) // 2).nonzero()[0])
    shown = (
        (two, two.looking_back, "2 layers, head {}:\nlooks most at the token before"),
        (two, two.inducing, "2 layers, head {}:\nhighest prefix-matching score"),
        (one, one.inducing, "1 layer, head {}:\nits highest prefix-matching score"),
    )
    figure = _figure(12, 4.4)
    grid = figure.subplots(1, 3)
    for axes, (run, head, title) in zip(grid, shown, strict=True):
        weights = heads.patterns(run.model, ids[row : row + 1, :-1])[head[0], 0, head[1]]
        image = axes.imshow(weights.numpy(), cmap="magma", vmin=0, vmax=1)
        axes.set(title=title.format(named(head)), xlabel="position of the key")
    grid[0].set_ylabel("position of the query")
    figure.colorbar(image, ax=grid, label="attention weight", shrink=0.85)
    figure.suptitle(f"A held-out sequence of period {periods[row]}")
    return figure


def circuits(one: Run, two: Run):
    """QK and OV circuits of the composed heads, and the control's OV; maps over tokens of one kind share a scale."""
    model, second, first, control = two.model, two.inducing, two.looking_back, one.inducing
    s, f, c = named(second), named(first), named(control)
    through, written = (f"token that {f} brought to the key", TOKENS[1]), ("token predicted", "token attended to")
    by_position = [
        (f"QK of head {f}, by position", _seen(heads.position_qk(model, first)), ("key's position", "query's position"))
    ]
    by_token = [
        (f"QK of head {s}, keys as they come", heads.token_qk(model, second), TOKENS),
        (f"QK of head {s}, keys through head {f}", heads.composed_qk(model, second, first), through),
    ]
    outputs = [
        (f"OV of head {f}", heads.token_ov(model, first), written),
        (f"OV of head {s}", heads.token_ov(model, second), written),
        (f"control (1 layer): OV of head {c}", heads.token_ov(one.model, control), written),
    ]
    figure = _figure(14.5, 8.6)
    top, bottom = figure.subplots(2, 3)
    _maps(figure, top[:1], by_position, "score less the row's mean, nats")
    _maps(figure, top[1:], by_token, "score, nats")
    _maps(figure, bottom, outputs, "logit, nats")
    return figure


def _maps(figure, line, maps, unit: str) -> None:
    """(title, matrix, axes' names) beside each other, on one scale, at whose ends the outermost thousandth is cut."""
    everything = torch.cat([x[~x.isnan()].abs() for _, x, _ in maps])
    most = everything.quantile(0.999).item()
    for axes, (title, x, (across, down)) in zip(line, maps, strict=True):
        image = axes.imshow(x.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set(title=title, xlabel=across, ylabel=down)
    figure.colorbar(image, ax=line, label=unit, shrink=0.85, extend="both")


def _seen(scores: Tensor) -> Tensor:
    """(N, N) scores less the mean of what each query sees, NaN where it does not see: only differences in a row matter."""
    seen = torch.ones_like(scores).tril()
    mean = (scores * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    return (scores - mean).masked_fill(seen == 0, math.nan)


def composition(two: Run):
    """What heads of the second layer read of what heads of the first wrote."""
    grids = heads.composition(two.model)
    most = max(x.abs().max().item() for x in grids.values())
    figure = _figure(11, 3.8)
    line = figure.subplots(1, 3, sharey=True)
    names = {layer: [named((layer, h)) for h in range(two.task.heads)] for layer in (0, 1)}
    for axes, (kind, x) in zip(line, grids.items(), strict=True):
        image = axes.imshow(x.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        for (row, column), value in ((at, x[at].item()) for at in ((r, c) for r in range(len(x)) for c in range(len(x)))):
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if abs(value) > 0.6 * most else "black",
            )
        axes.set_xticks(range(len(x)), names[0])
        axes.set_yticks(range(len(x)), names[1])
        axes.set(title=f"{kind}-composition", xlabel="head of layer 1, which writes")
    line[0].set_ylabel("head of layer 2, which reads")
    figure.colorbar(image, ax=line, label="score less that of random matrices", shrink=0.85)
    return figure


def ablation(one: Run, two: Run):
    """By how much the loss in the repeat grows without a head."""
    figure = _figure(9, 3.6)
    line = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    for axes, run, title in zip(line, (one, two), ("1 layer (control)", "2 layers"), strict=True):
        grown = ablated(run)
        for layer, row in enumerate(grown.tolist()):
            names = [named((layer, h)) for h in range(len(row))]
            bars = axes.bar(names, row, color=("tab:blue", "tab:red")[layer], label=f"layer {layer + 1}")
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set(title=f"{title}\nloss with all heads {run.points[-1].inside:.2f} nats", xlabel="head that writes nothing")
        axes.legend(fontsize=8)
        axes.margins(y=0.15)
    line[0].set_ylabel("the loss in the repeat grows by, nats")
    return figure


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _steps(run: Run) -> list[int]:
    return [p.step for p in run.points]


def _layers(run: Run) -> str:
    return f"{run.task.layers} layer{'s' * (run.task.layers != 1)}"
