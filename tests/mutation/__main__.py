"""Break the kernels, one place at a time, and see whether the tests notice: `make mutants`.

Kernels in kernels/hopper have faults of synchronisation planted (faults.py), which the simulator is to catch; all others have
operators, bounds and masks changed (mutants.py).

usage: python tests/mutation [--file NAME …] [--workers N] [--limit N] [--survivors] [--fast]

Each mutant runs in a process of its own, in Triton's interpreter, until the first test fails. One that nothing notices must
stand in equivalent.json with the reason why it changes no result. --survivors runs only those that are new, or that nothing
noticed last time and that have no reason yet, after the tests have been sharpened. Writes build/mutants/last.json (who killed
which) and result.md, where files that were not run keep what was found last; ends 1 if fewer than 95% are killed or a survivor
has no reason. --fast and --limit keep nothing: --fast leaves slow tests out, to see whether `make test` notices as much.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "kernels"
# Examples for users: they take no part in any other kernel, and their tests repeat their formulas.
EXAMPLES = {"score_mods.py"}
FILES = [
    *sorted({path.name for path in KERNELS.glob("*.py")} - EXAMPLES),
    *sorted(f"hopper/{path.name}" for path in KERNELS.glob("hopper/*.py")),
]
TESTS = ["test_small.py", "test_band.py", "test_addresses.py", "test_dropout.py", "test_features.py", "test_extremes.py"]
HOPPER_TESTS = sorted(path.name for path in (ROOT / "tests").glob("test_hopper*.py"))
SIMULATED = "not synchronisation and not whole and not compiler and not jit"  # what runs the kernels in the simulator
SELECTED = "test_small or test_ranges or test_addresses or (portable and (exact_near or averages or threshold or rounded))"
BACKWARD = ["full", "window-narrow", "padded", "groups", "softcap", "slopes-window", "bias-of-keys", "packed", "dropout"]
# What tells quickest about a file comes first; everything else follows for mutants that survive it.
FIRST = {
    "band.py": ["test_band.py", "window-narrow", "window", "dropout-window", "lower-right", "padded"],
    "dropout.py": ["dropout-window", "dropout"],
    "flash_bwd_dkdv.py": BACKWARD,
    "flash_bwd_dq.py": BACKWARD,
    "flash_bwd_dbias.py": ["bias-of-nothing", "bias-window", "bias-of-keys", "bias-of-queries", "bias", "packed-bias"],
    "flash_fwd.py": ["full", "window-narrow", "groups", "dropout", "packed"],
    "rounding.py": ["test_what_the_output_lost_when_it_was_rounded"],
    "score.py": ["test_addresses.py", "softcap", "bias-window", "slopes", "score-mod-log", "mask", "score-mod", "padded"],
    "sequence.py": ["packed-many", "packed", "padded", "packed-bias", "test_boundaries_that_nobody_checked"],
    "softmax.py": ["full", "strided", "sinks", "bnhd", "padded"],
    "tile.py": ["test_addresses.py", "full", "strided", "window-narrow", "packed"],
}
FIRST_HOPPER = [
    "many-heads",
    "groups",
    "all-slots-again",
    "several-tiles-causal",
    "packed-long",
    "window-of-many-tiles",
    "cut-inside",
    "padded-causal",
]
EQUIVALENT = HERE / "equivalent.json"
LIMIT_S = 40  # of processor time for a test; none takes a fourth of that
LIMIT_BYTES = 8 << 30

sys.path.insert(0, str(HERE))
from faults import faults  # noqa: E402
from kept import LAST, RESULT, last  # noqa: E402
from mutants import Mutant, mutants  # noqa: E402


def killed_by(mutant: Mutant, marks: str = "") -> str | None:
    """Run the tests with these marks against a mutant: the first that fails, "time" or "crash"; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels"
        shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))
        (kernels / mutant.file).write_text(mutant.source)
        report = Path(folder) / "report"
        for files, selected, first in _rounds(mutant.file):
            child = multiprocessing.get_context("fork").Process(
                target=_run_tests, args=(files, selected, marks, first, kernels, report)
            )
            child.start()
            child.join()
            if child.exitcode == -signal.SIGVTALRM:
                return "time"
            if child.exitcode != 0:
                return report.read_text().strip() or "crash" if report.exists() else "crash"
    return None


def _rounds(file: str) -> list[tuple[list[str], str, list[str]]]:
    """(test files, which of their tests, what comes first), one after the other, that are to notice a mutant of a file."""
    if file.startswith("hopper/"):
        own_first = sorted(HOPPER_TESTS, key=lambda name: ("backward" in name) != ("bwd" in file))
        return [([name], SIMULATED, FIRST_HOPPER) for name in own_first]
    first = FIRST.get(file, [])
    quick = [*(name for name in first if name.endswith(".py")), "test_small.py"]
    return [(files, SELECTED, first) for files in (quick, [name for name in TESTS if name not in quick])]


def _run_tests(files: list[str], selected: str, marks: str, first: list[str], kernels: Path, report: Path) -> None:
    """In the child: put the mutated kernels in the place of ours and run pytest until something fails."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    import pytest

    import tfkern.kernels

    tfkern.kernels.__path__[:] = [str(kernels)]

    def rank(item) -> int:
        for place, name in enumerate(first):
            if name in (Path(item.fspath).name, item.originalname) or re.match(
                rf"test_small\[{name}-|.*\[bf16-(flash_\w+-)?{name}(-\w+ launch(es)?)?\]", item.name
            ):
                return place
        return len(first)

    class First:
        def pytest_collection_modifyitems(self, items):
            items.sort(key=rank)

        def pytest_runtest_setup(self):
            signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)  # ends a process that hangs

        def pytest_runtest_logreport(self, report):
            if report.failed:
                path.write_text(report.nodeid.split("/")[-1] + _hazard(report.longreprtext))

        def pytest_collectreport(self, report):
            if report.failed:
                path.write_text("import")

    path = report
    plugins = [f"-pno:{name}" for name in ("cacheprovider", "xdist", "benchmark", "hypothesispytest")]  # slow to start
    arguments = ["-x", "-q", *plugins, "-m", marks, "-k", selected, *(str(ROOT / "tests" / name) for name in files)]
    status = pytest.main(arguments, plugins=[First()])
    os._exit(0 if status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else 1)


def _hazard(failure: str) -> str:
    """What the simulator says is wrong, if it is that which failed."""
    error = re.search(r"^E +gluonsim\.errors\.(?:HazardError: \[(\w+)\]|(Deadlock)Error)", failure, re.M)
    return f": {(error[1] or error[2]).lower()}" if error else ""


def named(found: list[Mutant]) -> dict[str, Mutant]:
    """Mutants by a name that stays when lines move: the change, and which one of those that read the same."""
    names, seen = {}, Counter()
    for mutant in found:
        seen[str(mutant)] += 1
        names[f"{mutant}" + (f" #{seen[str(mutant)]}" if seen[str(mutant)] > 1 else "")] = mutant
    return names


def work(name: str, mutant: Mutant, marks: str) -> tuple[str, str | None, float]:
    start = time.perf_counter()
    return name, killed_by(mutant, marks), time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", nargs="+", default=FILES, choices=FILES)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, help="only every so-manieth mutant, to have that many")
    parser.add_argument("--survivors", action="store_true", help="only those that survived last time")
    parser.add_argument("--fast", action="store_true", help="without slow tests")
    args = parser.parse_args()
    marks = "not slow" if args.fast else ""
    os.environ["TRITON_INTERPRET"] = "1"
    # Imported once, before the forks; what is mutated is imported in the children.
    import pytest  # noqa: F401
    import torch
    import triton  # noqa: F401

    import tfkern.testing  # noqa: F401

    if any(name.startswith("tfkern.kernels.") for name in sys.modules):
        raise RuntimeError("the kernels were imported before they could be mutated")

    torch.set_num_threads(1)
    found = named([mutant for name in FILES for mutant in of(name)])
    before = {name: killer for name, killer in (last() if args.survivors or LAST.exists() else {}).items() if name in found}
    reasons = json.loads(EQUIVALENT.read_text())
    todo = [name for name, mutant in found.items() if mutant.file in args.file]
    if args.survivors:
        todo = [name for name in todo if name not in before or not (before[name] or name in reasons)]
    if args.limit:
        todo = todo[:: max(1, len(todo) // args.limit)]
    for whole in {found[name].file.startswith("hopper/"): found[name].file for name in todo}.values():
        if killer := killed_by(Mutant(whole, 0, "", "", (KERNELS / whole).read_text()), marks):
            raise RuntimeError(f"{killer} fails on the kernels as they are")
    print(f"{len(todo)} mutants", flush=True)
    results = {}
    # Threads, each with one child at a time: a pool of processes could not end a child that hangs.
    with ThreadPoolExecutor(args.workers) as pool:
        for done in as_completed([pool.submit(work, name, found[name], marks) for name in todo]):
            name, killer, seconds = done.result()
            results[name] = killer
            print(f"{len(results):4} {killer or 'SURVIVED':60.60} {seconds:6.1f} s  {name}", flush=True)
    keep = not (args.limit or args.fast)
    if keep:
        results = before | results
    text, good = conclude({name: mutant for name, mutant in found.items() if name in results}, results, reasons)
    print(text)
    if keep:
        LAST.parent.mkdir(parents=True, exist_ok=True)
        LAST.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
        RESULT.write_text(text)
    return 0 if good else 1


def of(file: str) -> list[Mutant]:
    """All that is broken in a kernel file."""
    kind = faults if file.startswith("hopper/") else mutants
    return list(kind(file, (KERNELS / file).read_text()))


def conclude(found: dict[str, Mutant], results: dict[str, str | None], reasons: dict[str, str]) -> tuple[str, bool]:
    """(the tables, whether enough is killed and all else has a reason)."""
    survivors = {name: m for name, m in found.items() if results[name] is None}
    share = 1 - len(survivors) / max(1, len(found))
    total, alive = Counter(m.file for m in found.values()), Counter(m.file for m in survivors.values())
    lines = ["# Mutants of the kernels", "", "| file | mutants | killed | survive |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {total[name]} | {total[name] - alive[name]} | {alive[name]} |" for name in FILES if total[name]]
    lines += [f"| **all** | {len(found)} | {len(found) - len(survivors)} ({share:.1%}) | {len(survivors)} |", ""]
    lines += ["What survives, and why it changes no result:", ""]
    lines += [
        f"- `{m.file}`: `{m.before}` → `{m.after}`: {reasons.get(name, '**no reason known**')}" for name, m in survivors.items()
    ]
    lines += ["", "Faults of synchronisation in the kernels for Hopper, and what catches them:", ""]
    lines += ["| file | line | fault | caught by |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {m.file} | {m.line} | `{m.before[:90]}` → `{m.after[:90]}` | {_catcher(results[name])} |"
        for name, m in sorted(found.items(), key=lambda item: (item[1].file, item[1].line))
        if m.file.startswith("hopper/")
    ]
    return "\n".join(lines) + "\n", share >= 0.95 and all(name in reasons for name in survivors)


def _catcher(killer: str | None) -> str:
    """In a few words: what the simulator says, or the test that fails."""
    if killer is None:
        return "nothing: see above"
    test, _, hazard = killer.rpartition(": ")
    return f"simulator: {hazard}" if test else killer.replace("|", "or")


if __name__ == "__main__":
    sys.exit(main())
