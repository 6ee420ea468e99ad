"""From the rows of `make gpu` to a results file, tables, and plots; `tfkern bench report --results FILE` draws them again.

A results file is of one card, and so is a table: rows that another card gave are left out, and counted.
"""

import csv
import dataclasses
import json
import math
from pathlib import Path

from tfkern.bench import chips, providers, shapes
from tfkern.bench.results import ResultsError
from tfkern.bench.results import load as load_whole

PEERS = ("sdpa default", "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex", *providers.FLASH_ATTN)
OURS = ("tfkern hopper", "tfkern portable")
SHAPES = {s.name: s for s in (*shapes.GPU_SHAPES, *shapes.DRY_SHAPES)}
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
# Whose floor is known, by what the name of a card has. An H200 is an H100 with other memory: 4.8 TB/s by its data sheet, of
# which the H100's share of its own 3.35 is taken.
CHIPS = {
    "H100 80GB HBM3": ("H100", chips.H100),
    "H200": ("H200", dataclasses.replace(chips.H100, memory=chips.H100.memory * 4.8 / 3.35)),
}
OTHERS = ("NVL", "PCIe", "MIG")  # of the same names, but with fewer SMs or lower clocks

Case = tuple[str, str, bool]  # shape, direction, whether from a CUDA graph


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


def load(results: Path) -> tuple[dict, list[dict], int]:
    """(the machine, the rows that its card gave, how many another gave)."""
    loaded = load_whole(results)
    machine, rows = loaded["machine"], loaded["rows"]
    if unknown := {shape for shape, *_ in timed(rows)} - set(SHAPES):
        raise ResultsError(f"{results} has times of {sorted(unknown)}, shapes that this version of tfkern doesn't know")
    own = [row for row in rows if row.get("device", machine["device"]) == machine["device"]]
    return machine, own, len(rows) - len(own)


def timed(rows: list[dict]) -> dict[Case, dict[str, dict]]:
    """{case: {provider: row}} of what was timed; calls of Python and graphs are never compared with each other."""
    by_case: dict[Case, dict[str, dict]] = {}
    for row in rows:
        if row.keys() >= {"ms", "provider", "direction"}:
            by_case.setdefault((row["shape"], row["direction"], row["graph"]), {})[row["provider"]] = row
    return by_case


def fastest(by: dict[str, dict], names: tuple[str, ...]) -> dict | None:
    """The row of the fastest of these providers, if one was timed."""
    return min((by[name] for name in names if name in by), key=lambda row: row["ms"], default=None)


def chip(device: str) -> tuple[str, chips.Machine] | None:
    """(name, numbers) of a card whose floor is known."""
    found = (chip for part, chip in CHIPS.items() if part in device and not any(other in device for other in OTHERS))
    return next(found, None)


def floor_ms(shape: shapes.Shape, direction: str, machine: chips.Machine) -> float:
    """Milliseconds below which a chip can't be, in 16 bits."""
    return chips.floor(shape.flops(direction), shape.exps(direction), shape.bytes(direction, 2), machine) / 1e3


def table(results: Path) -> str:
    """Markdown: what was run on what, and a table of each kind of row that is there."""
    machine, rows, others = load(results)
    commits = sorted({row["commit"] for row in rows if row.get("commit")} or {machine.get("commit", "unknown")})
    versions = f"torch {machine['torch']}, Triton {machine.get('triton')}, tfkern {machine['tfkern']}"
    text = [f"{machine['device']}, {versions}, commit {', '.join(commits)}, {machine['date'][:10]}"]
    text += [f"{others} rows of other cards are not in these tables."] if others else []
    for part in (_speed(rows, machine["device"]), _finite(rows), _tiles(rows)):
        text += ["\n".join(part)] if len(part) > 2 else []
    return "\n\n".join(text)


def _row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _heading(*cells: str) -> list[str]:
    return [_row(*cells), _row(*["---"] * len(cells))]


def _speed(rows: list[dict], device: str) -> list[str]:
    """Ours, the best peer, the ratio, and the share of the chip's floor that ours reaches."""
    known = chip(device)
    floor = [f"of the floor of an {known[0]}"] if known else []
    lines = _heading("shape", "direction", "timed", "tfkern", "ms (TFLOP/s)", "best peer", "ms", "speed", *floor)
    for (shape, direction, graph), by in timed(rows).items():
        ours, peer = fastest(by, OURS), fastest(by, PEERS)
        if ours is None:
            continue
        other = [_who(peer), f"{peer['ms']:.3f}", f"{peer['ms'] / ours['ms']:.2f}x"] if peer else [""] * 3
        share = [f"{floor_ms(SHAPES[shape], direction, known[1]) / ours['ms']:.0%}"] if known else []
        how = "CUDA graph" if graph else "calls"
        lines.append(_row(shape, direction, how, _who(ours), f"{ours['ms']:.3f} ({ours['tflops']:.0f})", *other, *share))
    return lines


def _who(row: dict) -> str:
    """A provider and what it ran, as far as that is known."""
    return f"{row['provider']} ({', '.join(row['kernels'])})" if row.get("kernels") else row["provider"]


def _finite(rows: list[dict]) -> list[str]:
    """Whose gradients are NaN where scores are far below zero (peer_faults.py)."""
    found = [row for row in rows if "finite" in row]
    who, faults = (list(dict.fromkeys(row[key] for row in found)) for key in ("provider", "fault"))
    cells = {(row["fault"], row["provider"]): _gradients(row) for row in found}
    lines = _heading("scores near -120", *who)
    return lines + [_row(fault, *(cells.get((fault, one), "") for one in who)) for fault in faults]


def _gradients(row: dict) -> str:
    """Whether they are finite and right; of PyTorch's default also by which kernel."""
    bad = [name for name, fine in row["finite"].items() if not fine]
    wrong = row.get("wrong") or row.get("problem")
    found = f"{', '.join(bad)} not finite" if bad else f"wrong: {wrong}" if wrong else "right"
    return f"{found} ({row['kernels'][0]})" if row["provider"] == "sdpa default" and row.get("kernels") else found


def _tiles(rows: list[dict]) -> list[str]:
    """Of each kernel that was tuned on a shape, the fastest tiles beside those of the table."""
    lines = _heading("kernel", "shape", "the table's ms", "the best ms", "with")
    by: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.keys() >= {"ms", "own", "kernel"}:
            by.setdefault((row["backend"], row["kernel"], row["shape"]), []).append(row)
    for (backend, kernel, shape), found in by.items():
        before, best = min((x["ms"] for x in found if x["own"]), default=math.nan), min(found, key=lambda x: x["ms"])
        lines.append(_row(f"{backend} {kernel}", shape, f"{before:.3f}", f"{best['ms']:.3f}", best["tiles"]))
    return lines


def parts(file: Path) -> tuple[str, str]:
    """What stands before and after the marks of a Markdown file. ResultsError if it has none."""
    before, begin, rest = file.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ResultsError(f"{file} has no place for the table: a line {BEGIN} and behind it a line {END}")
    return before, after


def insert(text: str, file: Path) -> None:
    """Replace what stands between the marks of a Markdown file, or leave it as it is."""
    before, after = parts(file)
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def draw(results: Path) -> list[Path]:
    """TFLOP/s against length, with the chip's floor as a line; the ratio to the best peer; memory."""
    machine, rows, _ = load(results)
    about = f"{machine['device']}, {machine['date'][:10]}"
    by_case = timed(rows)
    if any(graph for *_, graph in by_case):
        by_case = {case: by for case, by in by_case.items() if case[2]}
        about += ", CUDA graphs"
    taken = [row for row in rows if "bytes" in row]
    figures = {}
    if by_case:
        figures |= dict(tflops=_draw_tflops(by_case, chip(machine["device"])), ratio=_draw_ratio(by_case))
    if taken:
        figures |= dict(memory=_draw_memory(taken))
    pictures = []
    for name, figure in figures.items():
        pictures.append(results.with_name(f"{results.stem}-{name}.png"))
        figure.suptitle(about)
        figure.savefig(pictures[-1], dpi=110, bbox_inches="tight")
    return pictures


def _draw_tflops(by_case: dict[Case, dict[str, dict]], known: tuple[str, chips.Machine] | None):
    from matplotlib.figure import Figure

    groups: dict[tuple, list[Case]] = {}
    for case in sorted(by_case, key=lambda case: SHAPES[case[0]].length):
        shape = SHAPES[case[0]]
        groups.setdefault((shape.head_dim, shape.is_causal, case[1]), []).append(case)
    figure = Figure(figsize=(6, 3.5 * len(groups)))
    places = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, ((dim, causal, direction), cases) in zip(places, sorted(groups.items()), strict=True):
        found = [SHAPES[shape] for shape, *_ in cases]
        lengths = [shape.length for shape in found]
        for provider in dict.fromkeys(p for case in cases for p in by_case[case]):
            rows = [by_case[case].get(provider) for case in cases]
            axes.plot(lengths, [row["tflops"] if row else math.nan for row in rows], marker="o", label=provider)
        if known:
            floors = [shape.flops(direction) / floor_ms(shape, direction, known[1]) / 1e9 for shape in found]
            axes.plot(lengths, floors, "k--", label=f"floor of an {known[0]}")
        title = f"D = {dim}{', causal' if causal else ''}, {direction}"
        axes.set(xscale="log", xlabel="length", ylabel="TFLOP/s", title=title)
        axes.legend(fontsize=6)
    figure.tight_layout()
    return figure


def _draw_ratio(by_case: dict[Case, dict[str, dict]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.3 * len(by_case)))
    axes = figure.subplots()
    pairs = {case: (fastest(by, OURS), fastest(by, PEERS)) for case, by in by_case.items()}
    ratios = {f"{s} {d}": peer["ms"] / ours["ms"] for (s, d, _), (ours, peer) in pairs.items() if ours and peer}
    axes.barh(list(ratios), list(ratios.values()))
    axes.axvline(1.0, color="k")
    axes.set(xlabel="best peer's time / ours")
    return figure


def _draw_memory(taken: list[dict]):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    for provider in dict.fromkeys(row["provider"] for row in taken):
        rows = [row for row in taken if row["provider"] == provider]
        axes.plot([r["length"] for r in rows], [r["bytes"] / 2**30 for r in rows], marker="o", label=provider)
    axes.set(xscale="log", yscale="log", xlabel="length", ylabel="GiB beyond the inputs")
    axes.legend()
    return figure
