"""Reads what is stored of finished studies, and stores what `smoa compare` wrote.

    python studies/stored.py FOLDER    # into studies/NAME: the results, and of each run config and the scores of rows

Studies with a `summary.json` were run by code at commit 1eaf65e9 and before, which is not needed. Of folders that were
left out of the repository, gone.json has the rows that tables and pictures still show, and searches.json has every
search of a learning rate.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from smoa_lab.basics.files import read_stored_lines

STUDIES = Path(__file__).parent
PACK = "runs.jsonl.gz"
GONE = STUDIES / "gone.json"
KEPT = ("README.md", "study.yaml", "differences.png", "sizes.png")
OF_RUN = ("config", "provenance", "digests", "parameters", "evaluation", "gain", "forgetting", "training")
OF_PART = ("digest", "group", "copy")
"""What all runs on a part have in common; `rows_of` names the run that it is stored with."""
OF_ROW = (*("tokens", "before", "after", "right_before", "right_after", "scored_before", "scored_after"),)
Run = dict[str, Any]


def folders() -> list[Path]:
    """Those with a summary."""
    return sorted(file.parent for file in STUDIES.glob("*/summary.json"))


def compared() -> list[Path]:
    """Those that `smoa compare` reports."""
    return sorted(file.parent for file in STUDIES.glob("*/results.json"))


def setup_of(study: str) -> dict[str, Any]:
    """What the final runs of a study with a summary trained."""
    setup: dict[str, Any] = _read(STUDIES / study / "summary.json")["setup"]
    return setup


def summary_of(study: str) -> Any:
    """A row for each entry; of two tasks, one after the other, an object with several tables."""
    file = STUDIES / study / "summary.json"
    if not file.is_file():
        return _read(GONE)[study]
    summary = _read(file)
    return summary.get("entries", summary)


def searches() -> dict[str, dict[str, Any]]:
    """Every search of a learning rate, by study and entry: what was trained, and the validation loss at each rate."""
    found: dict[str, dict[str, Any]] = _read(STUDIES / "searches.json")
    return found


@cache
def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def runs_of(folder: Path) -> dict[str, Run]:
    """All stored runs of a study of `smoa compare`, by their folders."""
    stored = read_stored_lines(folder / PACK)
    runs: dict[str, Run] = {run["name"]: run for run in stored}
    for run in (run for run in runs.values() if "rows_of" in run):
        whole = runs[run.pop("rows_of")]["rows"]
        run["rows"] = {key: whole[key] for key in OF_PART if key in whole} | run["rows"]
    return runs


def store(study: Path, target: Path) -> None:
    """Store a folder of `smoa compare`: what it reports and, of each run and row, loss and score, but no texts."""
    from smoa_lab.basics.values import finite
    from smoa_lab.study.finished import read_finished
    from smoa_lab.study.study import STUDY, load_study

    target.mkdir(exist_ok=True)
    for name in (name for name in KEPT if (study / name).is_file()):
        shutil.copy(study / name, target)
    shutil.copy(study / "summary.json", target / "results.json")
    lines, stored_with = list[str](), dict[str, str]()
    for name, run in read_finished(load_study(study / STUDY)).items():
        metrics, found = run.metrics, run.rows
        rows = [found[key] for key in sorted(found)]
        of_part, columns = (
            {key: finite([row.get(key) for row in rows]) for key in keys if any(key in row for row in rows)}
            for keys in (OF_PART, OF_ROW)
        )
        first = stored_with.setdefault(json.dumps(of_part), name)
        own = {"rows": of_part | columns} if first == name else {"rows_of": first, "rows": columns}
        lines.append(json.dumps({"name": name, **{key: metrics.get(key) for key in OF_RUN}} | own))
    packed = gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)
    (target / PACK).write_bytes(packed)


if __name__ == "__main__":
    store(Path(sys.argv[1]), STUDIES / Path(sys.argv[1]).name)
