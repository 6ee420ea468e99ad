"""What the last run of the mutants found, in build/: not in the repository, since any change to a kernel makes it stale."""

import json
import sys
from pathlib import Path

LAST = Path(__file__).resolve().parents[2] / "build" / "mutants" / "last.json"
RESULT = LAST.with_name("result.md")


def last(path: Path = LAST) -> dict[str, str | None]:
    """By the name of a mutant, the first test that failed on it, or None. Ends the program if there was no run here."""
    if not path.exists():
        sys.exit(f"{path} is not there: `make mutants` writes it, about an hour on two cores")
    return json.loads(path.read_text())
