"""Compare the rows of two runs of a compile gate, such as of the code before and after a change.

usage: python -m bench.static.compare BEFORE.json AFTER.json

Both files are written by `--json` of compile_gate or hopper_gate. A row is worse if it takes more of any resource (registers,
spilled bytes, shared memory, instructions) or if it has a problem and had none before. Prints each row that differs, and how
many are equal, better, worse, missing and new. The exit status is 1 if a row is worse or missing. Needs neither Triton nor
torch.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

from tfkern.ending import InputError, ended

COUNTED = ("registers", "spilled", "shared", "instructions")
NAMED = ("arch", "kernel", "dtype", "head_dim", "variant")


def name(row: dict) -> tuple:
    """The values that identify a row, without its tiles."""
    return tuple(str(row[field]) for field in NAMED if field in row)


def tiles(row: dict) -> tuple:
    """The tiles of a row of either gate, as strings."""
    return (row["tiles"],) if "tiles" in row else tuple(f"{k}={v}" for k, v in sorted(row["config"].items()) if k != "source")


def paired(before: list[dict], after: list[dict]) -> dict[str, tuple[dict | None, dict | None]]:
    """(row before, row after) by their common name; None for a row that is missing. The name includes the tiles only where rows
    would have the same name without them."""
    several = {key for rows in (before, after) for key, n in Counter(map(name, rows)).items() if n > 1}

    def named(rows: list[dict]) -> dict[str, dict]:
        found = {" ".join(name(row) + (tiles(row) if name(row) in several else ())): row for row in rows}
        if len(found) < len(rows):
            raise InputError("a file has two rows of the same kernel, variant and tiles")
        return found

    old, new = named(before), named(after)
    return {key: (old.get(key), new.get(key)) for key in old | new}


def differences(before: dict, after: dict) -> dict[str, tuple[float, float]]:
    """(before, after) of each count that differs, by its field. The counts of a kernel that does not compile are infinite."""
    pairs = {field: (before.get(field, math.inf), after.get(field, math.inf)) for field in COUNTED}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def judged(before: dict | None, after: dict | None) -> tuple[str, str]:
    """Return (verdict, differences as text). The verdict is "equal", "better", "worse", "missing" or "new"."""
    if before is None or after is None:
        return ("new" if before is None else "missing"), ""
    found = differences(before, after)
    told = [f"{field} {old} -> {new}" for field, (old, new) in found.items()]
    broken = after["problem"] is not None and before["problem"] is None
    if broken:
        told.append(after["problem"])
    worse = broken or any(new > old for old, new in found.values())
    return ("worse" if worse else "better" if found else "equal"), ", ".join(told)


def read(path: Path) -> list[dict]:
    """The rows of a file that a compile gate wrote. Raises InputError if it is another file, or has no rows."""
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            _ = row["kernel"], row["problem"], tiles(row)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not what a compile gate writes: {error!r}") from error
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    found = Counter()
    for key, pair in paired(read(args.before), read(args.after)).items():
        verdict, told = judged(*pair)
        found[verdict] += 1
        if verdict != "equal":
            print(f"{verdict:8} {key}: {told}" if told else f"{verdict:8} {key}")
    print(", ".join(f"{found[verdict]} {verdict}" for verdict in ("equal", "better", "worse", "missing", "new")))
    return 1 if found["worse"] or found["missing"] else 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
