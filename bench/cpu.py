"""The CPU backend beside PyTorch's attention, the naive formula and compiled FlexAttention: `tfkern bench cpu`.

Everybody is verified, then timed in turn within one run, round after round, so that a busy machine slows all of them. A figure
is the median with the 20th and the 80th percentile.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tfkern.bench import cpu_cases
from tfkern.bench.cpu_cases import HEADS, Provider, Task

LENGTHS = (8, 128, 197, 512, 2048, 8192)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIRECTIONS = ("forward", "forward+backward")
# Of the largest entry. A fault is far larger; smaller errors are judged by the tests, with budgets.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.04}
ROUNDS = 5  # at least


def run(cases, lengths, dtypes, threads, seconds: float) -> Iterator[dict]:
    """A row for each provider of each case, length, dtype, direction and number of threads."""
    before = torch.get_num_threads()
    try:
        for count, dtype, length, name in itertools.product(threads, dtypes, lengths, cases):
            torch.set_num_threads(count)
            task = cpu_cases.task(name, length, DTYPES[dtype])
            for direction in DIRECTIONS:
                about = dict(case=name, length=length, dtype=dtype, threads=count, direction=direction)
                yield from ({**about, **row} for row in figures(task, direction, seconds))
    finally:
        torch.set_num_threads(before)


def figures(task: Task, direction: str, seconds: float) -> Iterator[dict]:
    """The rows of one problem: medians in ms, or why there is none."""
    calls: dict[str, Callable] = {}
    for name, provider in task.providers.items():
        if isinstance(provider, str):
            yield dict(provider=name, skipped=provider)
        elif name == "flex" and direction != "forward":
            yield dict(provider=name, skipped="compiled FlexAttention has no backward on a CPU")
        else:
            call = _call(task, provider, direction)
            if wrong := _wrong(task, provider, call()):
                yield {"provider": name, "problem" if name == "tfkern" else "skipped": f"wrong results: {wrong}"}
            else:
                calls[name] = call
    for name, times in in_turn(calls, seconds).items():
        low, *_, high = statistics.quantiles(times, n=5)
        yield dict(provider=name, ms=statistics.median(times), p20=low, p80=high, rounds=len(times))


def in_turn(calls: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, round after round, for about so many seconds. Every second round goes backwards: a call pays
    for what the one before it did to caches and memory."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    start = time.perf_counter()
    while calls and (time.perf_counter() - start < seconds or len(next(iter(times.values()))) < ROUNDS):
        for name, call in order:
            before = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - before) * 1e3)
        order.reverse()
    return times


def _call(task: Task, provider: Provider, direction: str) -> Callable[[], list[Tensor]]:
    """The timed function: out alone, without autograd, or the gradients."""
    if direction == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [provider.function(*provider.leaves)]

        return forward
    leaves = [x.detach().requires_grad_() for x in provider.leaves]
    gradient = _gradient(task)
    if provider.leaves is not task.leaves:  # packed, as its leaves are
        gradient = gradient.transpose(1, 2)[task.rows[:, 0, :, 0]]
    return lambda: list(torch.autograd.grad(provider.function(*leaves), leaves, gradient))


def _gradient(task: Task) -> Tensor:
    """That of out, 0 in rows that don't count."""
    query = task.leaves[0]
    gradient = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(query.dtype)
    return gradient if task.rows is None else gradient * task.rows


def _wrong(task: Task, provider: Provider, found: list[Tensor]) -> str:
    """What differs from the naive formula in float64, on the first heads."""
    if not task.exact:
        return "" if all(x.isfinite().all() for x in found) else "NaN or inf"
    heads = slice(task.group)  # those of the first key head
    leaves = [x[:, heads if x.shape[1] == HEADS else slice(1)].double().requires_grad_() for x in task.leaves]
    options = {n: x[heads] if n in ("alibi_slopes", "sinks") else x for n, x in task.truth.keywords.items()}
    if (mask := options.get("attn_mask")) is not None and mask.dim() == 4:
        options["attn_mask"] = mask[:, heads]
    with torch.set_grad_enabled(len(found) > 1):
        truth = [task.truth.func(*leaves, **options)]
    if len(found) > 1:
        truth = torch.autograd.grad(truth, leaves, _gradient(task)[:, heads].double())
    found = [provider.padded(x)[:, : leaf.shape[1]].double() for x, leaf in zip(found, leaves, strict=False)]
    if len(found) == 1 and task.rows is not None:
        found, truth = ([x * task.rows for x in outs] for outs in (found, truth))
    worst = max(float((x - right).abs().max() / right.abs().max()) for x, right in zip(found, truth, strict=True))
    allowed = LARGEST_ERROR[task.leaves[0].dtype]
    return "" if worst <= allowed else f"off by {worst:.1e} of the largest entry, {allowed:.1e} allowed"


def ratios(rows: list[dict]) -> list[dict]:
    """tfkern's time over that of the faster of F.scaled_dot_product_attention and the naive formula."""
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "ms" in row:
            key = tuple(row[name] for name in ("threads", "dtype", "direction", "case", "length"))
            found.setdefault(key, {})[row["provider"]] = row["ms"]
    return [
        dict(zip(("threads", "dtype", "direction", "case", "length"), key, strict=True), ratio=ms["tfkern"] / min(others))
        for key, ms in found.items()
        if "tfkern" in ms and (others := [ms[name] for name in ("sdpa", "naive") if name in ms])
    ]


def _panel(row: dict) -> tuple:
    return row["threads"], row["dtype"], row["direction"]


def table(rows: list[dict]) -> str:
    """The ratios in Markdown, a table for each number of threads, dtype and direction."""
    parts = []
    found = sorted(ratios(rows), key=_panel)
    for head, rows_of_it in itertools.groupby(found, _panel):
        group = list(rows_of_it)
        lengths = sorted({row["length"] for row in group})
        cells = {(row["case"], row["length"]): f"{row['ratio']:.2f}" for row in group}
        lines = [f"{head[0]} thread{'s' * (head[0] > 1)}, {head[1]}, {head[2]}:", ""]
        lines += ["| N | " + " | ".join(map(str, lengths)) + " |", "| --- |" + " --- |" * len(lengths)]
        for case in dict.fromkeys(row["case"] for row in group):
            lines.append(f"| {case} | " + " | ".join(cells.get((case, n), "") for n in lengths) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(results: Path, picture: Path) -> None:
    """A panel for each number of threads, dtype and direction: ratios over lengths, a line for each case."""
    from matplotlib.figure import Figure

    loaded = json.loads(results.read_text())
    found = ratios(loaded["rows"])
    panels = sorted(set(map(_panel, found)))
    figure = Figure(figsize=(13, 4.6 * -(-len(panels) // 2)))
    looks = dict(zip(cpu_cases.CASES, itertools.product("-:", (f"C{i}" for i in range(7))), strict=False))
    first = None
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, place + 1, sharey=first)
        first = first or axes
        group = [row for row in found if _panel(row) == panel]
        for case in dict.fromkeys(row["case"] for row in group):
            points = sorted((row["length"], row["ratio"]) for row in group if row["case"] == case)
            style, colour = looks[case]
            axes.plot(*zip(*points, strict=True), linestyle=style, color=colour, marker="o", markersize=3, label=case)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel="time / the faster of sdpa and naive")
        lengths = sorted({row["length"] for row in group})
        axes.set_xticks(lengths, lengths, fontsize=8)
        axes.minorticks_off()
        axes.set_yticks((0.1, 0.2, 0.5, 1, 2, 5), ("0.1", "0.2", "0.5", "1", "2", "5"))
        axes.set_title(f"{panel[0]} thread{'s' * (panel[0] > 1)}, {panel[1]}, {panel[2]}", fontsize=9)
    figure.axes[-1].legend(fontsize=7, ncols=3, loc="upper right")
    about = loaded["machine"]
    computed = f"backend cpu of tfkern {about['tfkern']}, torch {about['torch']}, {about['date'][:10]}"
    figure.suptitle(f"Attention on a CPU: {computed}; below 1 tfkern is faster")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
