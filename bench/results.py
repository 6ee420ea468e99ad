"""Read a results file of `make gpu` and check that it is complete, before it is drawn or compared. Needs no torch."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

Check = Callable[[object], bool]


class ResultsError(ValueError):
    """Raised for a file that is not a results file of `make gpu`; the message says why."""


def _is(*kinds: type) -> Check:
    return lambda x: isinstance(x, kinds)


def _time(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf


MACHINE = dict(device=_is(str), torch=_is(str), tfkern=_is(str), date=_is(str), triton=_is(str, type(None)))
SHAPE = dict(name=_is(str), batch=_is(int), heads=_is(int), length=_is(int), head_dim=_is(int), is_causal=_is(bool))
# By the field that only this kind of row has: all fields of the kind.
ROWS: list[tuple[set[str], dict[str, Check]]] = [
    (
        {"ms", "provider", "direction"},
        dict(shape=_is(str), provider=_is(str), direction=_is(str), graph=_is(bool), ms=_time, tflops=_time),
    ),
    ({"finite"}, dict(fault=_is(str), provider=_is(str), finite=_is(dict))),
    ({"ms", "own", "kernel"}, dict(backend=_is(str), kernel=_is(str), shape=_is(str), own=_is(bool), tiles=_is(str), ms=_time)),
    ({"bytes"}, dict(provider=_is(str), length=_is(int), bytes=_is(int))),
]


def load(path: Path) -> dict:
    """The `machine`, `shapes` and `rows` of a file. ResultsError if it is missing or incomplete."""
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ResultsError(
            f"{path} can't be read ({error.strerror}); `make gpu` writes results to bench/results/<gpu>/<date>.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path} is no results file of `make gpu`, or not all of it: it is no JSON ({error})") from None
    if wrong := next(_wrong(loaded), None):
        raise ResultsError(f"{path} is no results file of `make gpu`, or a damaged one: {wrong}")
    return loaded


def _wrong(loaded: object) -> Iterator[str]:
    """The reasons why what was read is not a results file."""
    if not isinstance(loaded, dict):
        yield "it has no machine, shapes and rows"
        return
    yield from _lacking("machine", loaded.get("machine"), MACHINE)
    for name in ("shapes", "rows"):
        if not isinstance(loaded.get(name), list):
            yield f"its {name} are no list"
            return
    for number, shape in enumerate(loaded["shapes"]):
        yield from _lacking(f"shapes[{number}]", shape, SHAPE)
    for number, row in enumerate(loaded["rows"]):
        yield from _lacking(f"rows[{number}]", row, {})
        for marks, fields in ROWS:
            if row.keys() >= marks:
                yield from _lacking(f"rows[{number}]", row, fields)


def _lacking(what: str, found: object, fields: dict[str, Check]) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{what} is no object"
        return
    yield from (f"{what} has {name} {found.get(name)!r}" for name, right in fields.items() if not right(found.get(name)))
