"""Which of the tests that killed a mutant first `make test` has, and which it leaves to the slow ones.

usage: python tests/mutation/cover.py, after `make mutants`; `make mutants ARGS=--fast` shows whether the fast tests alone kill as many."""

import contextlib
import io
import re
from collections import Counter
from pathlib import Path

import pytest
from kept import last


class Collected:
    names: tuple[str, ...] = ()

    def pytest_collection_finish(self, session):
        self.names = tuple(plain(item.nodeid.split("/")[-1]) for item in session.items)


def plain(name: str) -> str:
    """file::test[case]. Some names were kept before cases had a number of passes, or a kernel's name, in them."""
    return re.sub(r"-[12]\]$|\]$", "", re.sub(r"flash_\w+?-", "", name))


def main() -> None:
    killed = last()
    collected = Collected()
    arguments = [
        "--collect-only",
        "-qq",
        "--no-summary",
        "-p",
        "no:xdist",
        "-m",
        "not slow",
        str(Path(__file__).resolve().parent.parent),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(arguments, plugins=[collected])
    killers = Counter()
    for killer in killed.values():
        if killer and "::" in killer:  # not what any test would kill: a hang, a crash
            killers[plain(re.sub(r": \w+$", "", killer))] += 1
    slow = {killer: n for killer, n in killers.items() if not any(name.startswith(killer) for name in collected.names)}
    for killer, n in sorted(slow.items(), key=lambda item: -item[1]):
        print(f"{n:4} {killer}")
    print(
        f"{killers.total() - sum(slow.values())} of {killers.total()} mutants by {len(killers) - len(slow)} of {len(killers)} tests"
    )


if __name__ == "__main__":
    main()
