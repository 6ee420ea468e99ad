"""Draw a results file: a panel for each direction, a group of bars for each shape, a bar for each provider."""

import json
from pathlib import Path


def draw(results: Path, picture: Path) -> None:
    """Read what runner.save wrote and write a PNG."""
    from matplotlib.figure import Figure

    loaded = json.loads(results.read_text())
    timed = [row for row in loaded["rows"] if "ms" in row]
    directions = list(dict.fromkeys(row["direction"] for row in timed))
    shapes = list(dict.fromkeys(row["shape"] for row in timed))
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    figure = Figure(figsize=(3 + 2 * len(shapes), 4 * len(directions)))
    for axes, direction in zip(figure.subplots(len(directions), 1, squeeze=False)[:, 0], directions, strict=True):
        for index, provider in enumerate(providers):
            found = {r["shape"]: r["tflops"] for r in timed if (r["direction"], r["provider"]) == (direction, provider)}
            places = [i + (index - len(providers) / 2) * 0.8 / len(providers) for i, s in enumerate(shapes) if s in found]
            axes.bar(places, [found[s] for s in shapes if s in found], 0.8 / len(providers), label=provider)
        axes.set_xticks(range(len(shapes)), shapes)
        axes.set_ylabel(f"{direction}, TFLOP/s")
        axes.legend(fontsize=7)
    about = loaded["machine"]
    figure.suptitle(f"{about['device']}, torch {about['torch']}, tfkern {about['tfkern']}, {about['date'][:10]}")
    figure.savefig(picture, dpi=110, bbox_inches="tight")
