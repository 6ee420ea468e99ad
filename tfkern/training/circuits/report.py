"""What `tfkern circuits` tells: tables, figures as JSON, and who computed them."""

import math
from dataclasses import asdict

import torch
from torch import Tensor

import tfkern
from tfkern.training.circuits import heads
from tfkern.training.circuits.heads import Head
from tfkern.training.circuits.runs import FORMED, Run, ablated, apart, ideals
from tfkern.training.provenance import setting


def provenance(run: Run, seed: int) -> str:
    """Backend, versions and device, for every table and picture."""
    c = run.model.config
    q = torch.empty(run.task.rows, c.heads, c.context, c.width // c.heads)
    backend = tfkern.explain(q, q, q, is_causal=True).split()[0]
    return (
        f"tfkern {tfkern.__version__}, attention by backend {backend}, weights and circuits by plain PyTorch; "
        f"{setting(q.device, seed)}"
    )


def named(head: Head) -> str:
    """Layer and number, both from 1: (1, 2) is 2.3."""
    return f"{head[0] + 1}.{head[1] + 1}"


MODELS = (
    "layers", "parameters", "loss in the repeat, before", "after", "elsewhere, after", "induction score, before", "after",
    "by head", "induction head after", "trained in",
)  # fmt: skip


def models(runs: list[Run]) -> list[tuple[str, ...]]:
    """A row a model, under MODELS. Losses in nats."""
    rows = []
    for run in runs:
        first, last, formed = run.points[0], run.points[-1], run.formed
        scores = (f"{first.induction:.3f}", f"{last.induction:.3f}", named(run.inducing)) if run.task.layers else ("", "", "")
        rows.append((
            str(run.task.layers), f"{sum(x.numel() for x in run.model.parameters()):,}", f"{first.inside:.3f}",
            f"{last.inside:.3f}", f"{last.outside:.3f}", *scores,
            f"{formed.step} steps, {formed.seconds:.0f} s" if formed else "never", f"{last.seconds:.0f} s",
        ))  # fmt: skip
    return rows


HEADS = ("layers", "head", "previous token", "prefix matching, before", "after", "copying", "loss without it")


def each_head(runs: list[Run]) -> list[tuple[str, ...]]:
    """A row a head, under HEADS; the last is by how many nats the loss in the repeat grows."""
    rows = []
    for run in runs:
        first, last, grown = run.points[0], run.points[-1], ablated(run)
        for layer in range(run.task.layers):
            for number in range(run.task.heads):
                at = layer, number
                figures = (x[at].item() for x in (last.previous, first.prefix, last.prefix, last.copying))
                rows.append((str(run.task.layers), named(at), *(f"{x:.3f}" for x in figures), f"{grown[at].item():+.3f}"))
    return rows


CIRCUITS = ("circuit", "of head", "mean on the diagonal", "mean elsewhere", "spread elsewhere", "diagonal highest of its row")


def circuits(two: Run) -> list[tuple[str, ...]]:
    """A row a token circuit of the composed heads, under CIRCUITS; entries in nats."""
    model, second, first = two.model, two.inducing, two.looking_back
    matrices = {
        ("QK, keys as they come", named(second)): heads.token_qk(model, second),
        ("QK, keys through head " + named(first), named(second)): heads.composed_qk(model, second, first),
        ("OV", named(second)): heads.token_ov(model, second),
        ("OV, all heads of its layer", "together"): sum(heads.token_ov(model, (second[0], h)) for h in range(two.task.heads)),
    }
    return [(*name, *_diagonal(x)) for name, x in matrices.items()]


SHARES = ("control's head", "tokens that it raises most of all heads", "correlation with the attention that they draw")


def shares(one: Run) -> list[tuple[str, ...]]:
    """A row a head of the model of one layer, under SHARES: how the heads divide the tokens among them, by the diagonals of
    their OV circuits, and whether they look at those that they raise."""
    number, read = range(one.task.heads), one.task.held_out()[0][:, :-1]
    raised = torch.stack([heads.token_ov(one.model, (0, h)).diagonal() for h in number])  # (H, V)
    attention = heads.drawn(heads.patterns(one.model, read), read, one.task.vocab_size)[0]
    counts = torch.bincount(raised.argmax(0), minlength=len(number))
    alike = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(raised, attention, strict=True)]
    return [(named((0, h)), f"{counts[h]} of {raised.shape[1]}", f"{r:.3f}") for h, r in zip(number, alike, strict=True)]


def _diagonal(x: Tensor) -> tuple[str, ...]:
    on = torch.eye(len(x), dtype=torch.bool)
    highest = (x.argmax(-1) == torch.arange(len(x))).sum().item()
    return f"{x[on].mean().item():+.2f}", f"{x[~on].mean().item():+.2f}", f"{x[~on].std().item():.2f}", f"{highest} of {len(x)}"


def shortcomings(runs: list[Run]) -> list[str]:
    """What is not as the papers say; empty if the model of two layers has an induction head and the control has none."""
    problems = []
    for run in runs:
        formed, wanted = run.formed is not None, run.task.layers >= 2
        if formed != wanted:
            problems.append(
                f"{run.task.layers} layers: {'an' if formed else 'no'} induction head, highest prefix-matching score "
                f"{run.points[-1].induction:.3f} at the end; {FORMED} or more makes one"
            )
    return problems


def figures(runs: list[Run], computed_by: str) -> dict:
    """Everything that was measured, for JSON."""
    two = runs[-1]
    any_seen, looked_up = ideals(two.task)
    told = dict(
        computed_by=computed_by, task=asdict(two.task), chance=chance(two),
        guessing=math.log(two.task.vocab_size), any_seen=any_seen, looked_up=looked_up,
        models=[dict(zip(_unique(MODELS), row, strict=True)) for row in models(runs)],
        heads=[dict(zip(_unique(HEADS), row, strict=True)) for row in each_head(runs)],
    )  # fmt: skip
    for run in runs:
        told[f"{run.task.layers} layers"] = dict(
            apart=apart(run),
            points=[{k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(p).items()} for p in run.points],
        )
    return told


def chance(run: Run) -> float:
    """The prefix-matching score of looking everywhere alike, on held-out sequences."""
    ids, periods = run.task.held_out()
    return heads.chance(ids[:, :-1], periods)


def _unique(headings: tuple[str, ...]) -> list[str]:
    """Headings that stand alone: "after" is said of what came before it."""
    whole = []
    for heading in headings:
        whole.append(whole[-1].replace("before", "after") if heading == "after" else heading)
    return whole
