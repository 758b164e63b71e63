"""How many branches of src/smoa the tests took that ran last with `--cov`, and whether that is enough.

    python -m tests.branch_coverage

pytest-cov's own limit counts lines and branches together, where the many lines hide a branch that is missing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coverage

LIMIT = 0.95
LAB = "experiments"


def count(files: Mapping[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Branches taken and branches in all, of the library and of the lab, from the files of a JSON report."""
    taken: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, file in files.items():
        part = "lab" if LAB in Path(name).parts else "library"
        taken[part] += file["summary"]["covered_branches"]
        total[part] += file["summary"]["num_branches"]
    return taken, total


def share(taken: int, total: int) -> str:
    return f"{taken} of {total} ({taken / total:.1%})"


def last_report() -> dict[str, Any]:
    """Coverage's JSON report on the data that lie in the current folder."""
    measured = coverage.Coverage(messages=False)
    measured.load()
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "coverage.json"
        measured.json_report(outfile=str(file))
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def main() -> None:
    taken, total = count(last_report()["files"])
    parts = ", ".join(f"{part} {share(taken[part], total[part])}" for part in total)
    together = share(taken.total(), total.total())
    print(f"branches of src/smoa that the tests take: {together}; {parts}")  # noqa: T201
    if taken.total() < LIMIT * total.total():
        sys.exit(f"fewer than {LIMIT:.0%} of the branches are tested; the table above names what is left out")


if __name__ == "__main__":
    main()
