"""The pages of docs/models.md that come from the sweep of tests/models_sweep.py."""

from collections import Counter

RUNS = {"plain": "no padding", "right": "right", "left": "left", "gradients": "gradients", "generate": "generate"}
BY = {
    "tfkern": "by tfkern",
    "both": "in part by tfkern",
    "own": "by their own attention",
    "none": "without attention of this kind",
}


def attention_of(result: dict) -> str:
    """Who computes the attention of a class that runs."""
    if result["calls"]:
        return "both" if result["told"] else "tfkern"
    return "own" if result["told"] else "none"


def render(results: dict[str, dict]) -> list[str]:
    """Lines of markdown."""
    counts = Counter(r["status"] for r in results.values())
    kinds = Counter(attention_of(r) for r in results.values() if r["status"] in ("right", "wrong"))
    families = sorted({r["family"] for r in results.values()})
    return [
        "## Every model of transformers",
        "",
        "Written from tests/models_sweep.json, which `tests/models_sweep.py` makes. It takes every public model class, made small by its",
        'config alone, with random weights in float32, and compares it with `attn_implementation="eager"`: without padding, with padding on',
        "the right and on the left, the gradients of all parameters, and greedy generation from prompts padded on the left. A result is",
        "right if it differs by less than 0.002 of the largest entry.",
        "",
        "Some results differ from eager attention for a reason that is not tfkern's, and count as right if they agree with another one:",
        "",
        "- *as the default*, *as sdpa*: tfkern equals the model's default attention, or PyTorch's. Where a mask hides all keys from a query,",
        "  eager attention averages over all of them, but tfkern and PyTorch return 0. Eager attention also adds bool masks as numbers.",
        "- *as added*: tfkern equals eager attention if its masks are added to the scores, too.",
        "- *as float64*: the two agree in float64. The model's own operations lose too much in float32.",
        "",
        f"{len(results)} classes of {len(families)} families: {counts['right']} right ("
        + ", ".join(f"{kinds[kind]} {text}" for kind, text in BY.items())
        + f"), {counts['wrong']} wrong, {counts['refused']} refused with an error that says what to do, {counts['error']} with another error, "
        f"{counts['not built']} not tried: they did not run with eager attention either.",
        "",
        'The column "attention" has who computes it: tfkern, the model\'s own code, both, or none of this kind.',
        "",
        "| family | classes | attention | " + " | ".join(RUNS.values()) + " |",
        "| --- " * (len(RUNS) + 3) + "|",
        *(_row(name, results) for name in families if _ran(name, results)),
        "",
        "### Not right",
        "",
        *(_reasons(results, ("wrong", "error", "refused")) or ["None."]),
        "",
        "### Not tried",
        "",
        *_reasons(results, ("not built",)),
    ]  # fmt: skip


def _ran(family: str, results: dict[str, dict]) -> list[dict]:
    return [r for r in results.values() if r["family"] == family and r["status"] in ("right", "wrong")]


def _row(family: str, results: dict[str, dict]) -> str:
    ran = _ran(family, results)
    kinds = sorted({attention_of(r) for r in ran})
    cells = [_cell(run, ran) for run in RUNS]
    return f"| {family} | {len(ran)} | {', '.join(kinds)} | " + " | ".join(cells) + " |"


def _cell(run: str, ran: list[dict]) -> str:
    """How many classes are right."""
    right, wrong, others = 0, 0, Counter()
    for r in ran:
        found = {n: x for n, x in r["cases"].items() if (n == run or n.endswith(run)) and not isinstance(x, str)}
        if not found:
            continue
        agreed = [r["agreed"][n] for n in found if n in r["agreed"]]
        bad = any(x >= 2e-3 and n not in r["agreed"] for n, x in found.items())
        wrong, right = wrong + bad, right + (not bad)
        others.update(agreed[:1] if not bad else [])
    if not right and not wrong:
        return ""
    notes = [f"{n} as {other}" for other, n in sorted(others.items())]
    return " ".join([f"✓ {right}"] * bool(right) + [f"no {wrong}"] * bool(wrong) + [f"({', '.join(notes)})"] * bool(notes))


def _reasons(results: dict[str, dict], statuses: tuple[str, ...]) -> list[str]:
    """A line for each family and reason."""
    found = {}
    for name, r in sorted(results.items()):
        if r["status"] in statuses:
            reason = r.get("reason") or ", ".join(
                f"{n}: {x}" for n, x in r.get("cases", {}).items() if x != 0 and not isinstance(x, str)
            )
            found.setdefault(
                (r["family"], " ".join(reason.split("; ")[0].split())[:140] or "inputs that nobody here makes up"), []
            ).append(name)
    return [f"- {', '.join(names)}: `{reason.replace('`', '')}`" for (_, reason), names in sorted(found.items())]
