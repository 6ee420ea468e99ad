"""From the rows of `make gpu` to a results file, a table, and plots; `tfkern bench report --results FILE` draws them again."""

import csv
import dataclasses
import json
import math
from pathlib import Path

from tfkern.bench import cost_model, providers, shapes

PEERS = ("sdpa default", "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex", *providers.FLASH_ATTN)
OURS = ("tfkern hopper", "tfkern portable")
SHAPES = {s.name: s for s in (*shapes.GPU_SHAPES, *shapes.DRY_SHAPES)}
STEPS = ("headline", "hopper", "flex")  # whose rows are figures of providers on shapes
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def write(found: list[dict], folder: Path, machine: dict) -> Path:
    """<date>.json, <date>.csv and the plots from rows; returns the first."""
    results = folder / f"{machine['date'][:10]}.json"
    known = [dataclasses.asdict(shape) for shape in SHAPES.values()]
    results.write_text(json.dumps(dict(machine=machine, shapes=known, rows=found), indent=0) + "\n")
    _write_csv(found, results.with_suffix(".csv"))
    print(table(results))
    draw(results)
    return results


def _write_csv(rows: list[dict], path: Path) -> None:
    flat = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)


def timed(results: Path) -> dict[tuple[str, str], dict[str, dict]]:
    """{(shape, direction): {provider: row}} of what was timed, in CUDA graphs where any was: none with the Python around it
    stands beside one without."""
    rows = [row for row in json.loads(results.read_text())["rows"] if row["step"] in STEPS and "ms" in row]
    graphs = {(row["shape"], row["direction"]) for row in rows if row["graph"]}
    by_case: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        key = row["shape"], row["direction"]
        if row["graph"] == (key in graphs):
            by_case.setdefault(key, {})[row["provider"]] = row
    return by_case


def fastest(by: dict[str, dict], names: tuple[str, ...]) -> dict | None:
    """The row of the fastest of these providers, if one was timed."""
    return min((by[name] for name in names if name in by), key=lambda row: row["ms"], default=None)


def floor_ms(shape: shapes.Shape, direction: str) -> float:
    """Milliseconds below which an H100 can't be, in 16 bits."""
    return cost_model.floor(shape.flops(direction), shape.exps(direction), shape.bytes(direction, 2)) / 1e3


def table(results: Path) -> str:
    """Markdown: ours, the best peer, the ratio, and the share of the floor that ours reaches."""
    about = json.loads(results.read_text())["machine"]
    versions = f"torch {about['torch']}, Triton {about.get('triton')}, tfkern {about['tfkern']}"
    lines = [
        f"{about['device']}, {versions}, {about['date'][:10]}",
        "",
        "| shape | direction | tfkern ms (TFLOP/s) | best peer | ms | speed | of the floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (shape, direction), by in timed(results).items():
        ours, peer = fastest(by, OURS), fastest(by, PEERS)
        if ours is None:
            continue
        other = f"{peer['provider']} | {peer['ms']:.3f} | {peer['ms'] / ours['ms']:.2f}x" if peer else " | | "
        share = floor_ms(SHAPES[shape], direction) / ours["ms"]
        lines.append(f"| {shape} | {direction} | {ours['ms']:.3f} ({ours['tflops']:.0f}) | {other} | {share:.0%} |")
    return "\n".join(lines)


def insert(text: str, file: Path) -> None:
    """Replace what stands between the marks of a Markdown file."""
    before, rest = file.read_text().split(BEGIN)
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def draw(results: Path) -> list[Path]:
    """TFLOP/s against length with the floor as a line, ratio to the best peer, and memory."""
    from matplotlib.figure import Figure

    loaded = json.loads(results.read_text())
    about = f"{loaded['machine']['device']}, {loaded['machine']['date'][:10]}"
    by_case = timed(results)
    groups = sorted({(SHAPES[s].head_dim, SHAPES[s].is_causal, d) for s, d in by_case})
    pictures = []

    def save(figure, name: str) -> None:
        pictures.append(results.with_name(f"{results.stem}-{name}.png"))
        figure.suptitle(about)
        figure.savefig(pictures[-1], dpi=110, bbox_inches="tight")

    if groups:
        figure = Figure(figsize=(6, 3.5 * len(groups)))
        for axes, (dim, causal, direction) in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
            names = [s for s, d in by_case if (SHAPES[s].head_dim, SHAPES[s].is_causal, d) == (dim, causal, direction)]
            names.sort(key=lambda s: SHAPES[s].length)
            lengths = [SHAPES[s].length for s in names]
            for provider in dict.fromkeys(p for s in names for p in by_case[s, direction]):
                rows = [by_case[s, direction].get(provider) for s in names]
                axes.plot(lengths, [row["tflops"] if row else math.nan for row in rows], marker="o", label=provider)
            floors = [SHAPES[s].flops(direction) / floor_ms(SHAPES[s], direction) / 1e9 for s in names]
            axes.plot(lengths, floors, "k--", label="floor")
            axes.set(
                xscale="log", xlabel="length", ylabel="TFLOP/s", title=f"D = {dim}{', causal' if causal else ''}, {direction}"
            )
            axes.legend(fontsize=6)
        figure.tight_layout()
        save(figure, "tflops")
        figure = Figure(figsize=(8, 1 + 0.3 * len(by_case)))
        axes = figure.subplots()
        labels, ratios = [], []
        for (shape, direction), by in by_case.items():
            ours, peer = fastest(by, OURS), fastest(by, PEERS)
            if ours and peer:
                labels.append(f"{shape} {direction}")
                ratios.append(peer["ms"] / ours["ms"])
        axes.barh(labels, ratios)
        axes.axvline(1.0, color="k")
        axes.set(xlabel="best peer's time / ours")
        save(figure, "ratio")
    taken = [row for row in loaded["rows"] if row["step"] == "memory" and "bytes" in row]
    if taken:
        figure = Figure()
        axes = figure.subplots()
        for provider in dict.fromkeys(row["provider"] for row in taken):
            rows = [row for row in taken if row["provider"] == provider]
            axes.plot([r["length"] for r in rows], [r["bytes"] / 2**30 for r in rows], marker="o", label=provider)
        axes.set(xscale="log", yscale="log", xlabel="length", ylabel="GiB beyond the inputs")
        axes.legend()
        save(figure, "memory")
    return pictures
