"""Reports stored studies of `smoa compare` anew, from their runs:

    python studies/again.py chats-2 chain-sum gsm8k    # README.md and pictures
    python studies/again.py replay    # studies/replay.json: after which round each would have ended, and in how long
    python studies/again.py unpack PLACE recall-1024    # its runs, with which `smoa compare` goes on in PLACE

A folder of runs is written for a while, and reported as `smoa compare --report-only`
reports one.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any

from stored import PACK, STUDIES, compared, runs_of

from smoa_lab.basics.files import write_whole
from smoa_lab.basics.values import json_text
from smoa_lab.study.finished import Finished, Run, finals, read_finished, searched
from smoa_lab.study.report import PICTURES, report
from smoa_lab.study.study import STUDY, Study, load_study
from smoa_lab.study.verdict import verdict

REPLAY = STUDIES / "replay.json"
WRITTEN = ("README.md", *PICTURES)
OFFLINE = "a611ba2074e52dc67b481945b82028d63ebcc7a8dd3e43b1474cbeec6a1a4e96"
ONLINE = "f9a477308c09e3baf70dc6e9330e08453662601440b4d27ade0d9a7e1e310667"
"""Of smollm2-135m as it was unpacked without and with the internet, by a flag that transformers noted: now one base."""


def unpack(folder: Path, place: Path) -> None:
    """Write a study's file and runs into a folder of its name in ``place``."""
    target = place / "studies" / folder.name
    target.mkdir(parents=True)
    (target / STUDY).write_bytes((folder / STUDY).read_bytes())
    for name, run in runs_of(folder).items():
        (target / name).mkdir(parents=True)
        rows = [dict(zip(run["rows"], row, strict=True)) for row in zip(*run["rows"].values(), strict=True)]
        with gzip.open(target / name / "rows.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        metrics: dict[str, Any] = {key: run[key] for key in run if key not in ("rows", "name")}
        text = json.dumps(metrics | {"samples": [], "history": []}).replace(OFFLINE, ONLINE)
        (target / name / "metrics.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def unpacked(folder: Path) -> Iterator[Study]:
    """The study in a folder of runs, under the name that it had, in a place of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        unpack(folder, Path(place))
        os.chdir(place)
        try:
            yield load_study(Path("studies", folder.name, STUDY))
        finally:
            os.chdir(before)


def write(folder: Path) -> None:
    with unpacked(folder) as study:
        report(study)
        for name in (name for name in WRITTEN if (study.folder / name).is_file()):
            write_whole(folder / name, (study.folder / name).read_bytes())


def replay(folder: Path) -> dict[str, Any]:
    """In every order of as many seeds as were planned, of those that all entries ran: after which round the study would
    have ended, what it would have taken of each budget, and its minutes as a share of those of all rounds, searches
    included. A budget that has its answer runs no further."""
    with unpacked(folder) as study:
        finished, budgets = read_finished(study), study.budgets()
        runs = {name: finals(study, finished, name) for name in study.entries}
        searches = sum(map(seconds, (run for name in study.entries for run in searched(study, finished, name))))
        of_round = {name: fmean(map(seconds, own.values())) for name, own in runs.items()}
        seeds = [seed for seed in study.seeds if all(seed in own for own in runs.values())]
        planned = min(len(seeds), study.planned)
        ends = [ended(study, finished, order) for order in permutations(seeds, planned)]
        whole = searches + planned * sum(of_round.values())

        def minutes(end: dict[str, tuple[str, int]]) -> float:
            rounds = {name: end[budget][1] for budget, own in budgets.items() for name in own}
            return (searches + sum(rounds[name] * of_round[name] for name in rounds)) / whole

        return {
            "rounds": _counts(max(number for _, number in end.values()) for end in ends),
            "takes": _counts(
                take if len(budgets) == 1 else f"{budget}: {take}" for end in ends for budget, (take, _) in end.items()
            ),
            "minutes": fmean(map(minutes, ends)),
        }


def seconds(run: Run) -> float:
    return float(run.metrics["training"]["seconds"])


def _counts(found: Iterable[Any]) -> dict[str, int]:
    return {str(each): number for each, number in sorted(Counter(found).items())}


def ended(study: Study, finished: Finished, order: tuple[int, ...]) -> dict[str, tuple[str, int]]:
    """Of each budget what is taken, and after which round, if seeds come in this order and all were planned."""
    entries = {name: entry.model_copy(update={"added": 0}) for name, entry in study.entries.items()}
    as_planned = study.model_copy(update={"seeds": list(order), "rounds": None, "entries": entries})
    found = verdict(as_planned, finished)
    return {budget: (str(one.take), one.round if one.is_answered else len(order)) for budget, one in found.items()}


def main(names: list[str]) -> None:
    if names[:1] == ["unpack"]:
        for name in names[2:]:
            unpack(STUDIES / name, Path(names[1]))
        return
    if names == ["replay"]:
        found = {folder.name: replay(folder) for folder in compared() if (folder / PACK).is_file()}
        write_whole(REPLAY, json_text(found) + "\n")
    for name in (name for name in names if name != "replay"):
        write(STUDIES / name)


if __name__ == "__main__":
    main(sys.argv[1:])
