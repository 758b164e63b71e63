"""Writes README.md and differences.png of stored studies of `smoa compare` anew, from their runs:

    python studies/again.py chats-2 chain-sum gsm8k
    python studies/again.py replay    # studies/replay.json: after which round each would have ended, and in how long

Other stored files are read alone. A folder of runs is written for a while, and reported as `smoa compare --report-only`
reports one.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any

from stored import PACK, STUDIES, compared, runs_of

from smoa.atomic import write_whole
from smoa_lab.basics.plain import json_text
from smoa_lab.study.planning import prepare
from smoa_lab.study.results import Found
from smoa_lab.study.run_study import Comparison
from smoa_lab.study.study import Study, load_study
from smoa_lab.study.study_report import PICTURES, report

REPLAY = STUDIES / "replay.json"
WRITTEN = ("README.md", *PICTURES.values())


@contextlib.contextmanager
def unpacked(folder: Path) -> Iterator[Study]:
    """The study in a folder of runs, under the name that it had, in a place of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        target = Path(place, "studies", folder.name)
        target.mkdir(parents=True)
        for name in ("study.yaml", "plan.json", "chosen.json"):
            shutil.copy(folder / name, target)
        for name, run in runs_of(folder).items():
            (target / name).mkdir(parents=True)
            rows = [dict(zip(run["rows"], row, strict=True)) for row in zip(*run["rows"].values(), strict=True)]
            with gzip.open(target / name / "rows.jsonl.gz", "wt", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
            metrics: dict[str, Any] = {key: run[key] for key in run if key not in ("rows", "name")}
            metrics |= {"samples": [], "history": []}
            (target / name / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        os.chdir(place)
        try:
            yield load_study(Path("studies", folder.name, "study.yaml"))
        finally:
            os.chdir(before)


def write(folder: Path) -> None:
    with unpacked(folder) as study:
        report(Comparison(study, prepare(study, None)))
        for name in (name for name in WRITTEN if (study.folder / name).is_file()):
            write_whole(folder / name, (study.folder / name).read_bytes())


def replay(folder: Path) -> dict[str, Any]:
    """In every order of the seeds, planned in today's format: after which round the study would have ended, what it
    would have taken, and its minutes as a share of those of all rounds, searches included."""
    with unpacked(folder) as study:
        comparison = Comparison(study, prepare(study, None))
        found, plan = comparison.found(), comparison.plan
        searches = sum(len(one.losses) * plan.seconds("search", name) for name, one in comparison.chosen.items())
        of_round = sum(plan.seconds("final", name) for name in plan.entries)
        ends = [ended(found, order) for order in permutations(plan.seeds)]
        whole = searches + len(plan.seeds) * of_round
        takes = sorted({str(entry) for entry, _ in ends})
        return {
            "rounds": {str(number): [end for _, end in ends].count(number) for number in {end for _, end in ends}},
            "takes": {take: [str(entry) for entry, _ in ends].count(take) for take in takes},
            "minutes": fmean((searches + end * of_round) / whole for _, end in ends),
        }


def ended(found: Found, order: tuple[int, ...]) -> tuple[str | None, int]:
    """What is taken, and after which round; all of them where nothing is."""
    changed = found.plan.model_copy(
        update={"format": 3, "seeds": list(order), "listed": list(order), "planned": len(order)}
    )
    for number in changed.looked_at():
        budget = replace(found, plan=changed).budgets(number)["all"]
        if (decision := budget.decision()) is not None:
            return decision.entry, number
    return None, len(order)


def main(names: list[str]) -> None:
    if names == ["replay"]:
        found = {folder.name: replay(folder) for folder in compared() if (folder / PACK).is_file()}
        write_whole(REPLAY, json_text(found) + "\n")
    for name in (name for name in names if name != "replay"):
        write(STUDIES / name)


if __name__ == "__main__":
    main(sys.argv[1:])
