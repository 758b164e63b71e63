"""Writes README.md and differences.png of stored studies of `smoa compare` anew, from their runs:

    python studies/again.py chats-2 chain-sum gsm8k
    python studies/again.py replay    # studies/replay.json: after which round each would have ended, and in how long
    python studies/again.py unpack PLACE recall-1024    # its runs, with which `smoa compare` goes on in PLACE

Other stored files are read alone. A folder of runs is written for a while, and reported as `smoa compare --report-only`
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
from smoa_lab.study.study import FORMAT, Study, load_study
from smoa_lab.study.study_report import PICTURES, report

REPLAY = STUDIES / "replay.json"
WRITTEN = ("README.md", *PICTURES.values())
OFFLINE = "a611ba2074e52dc67b481945b82028d63ebcc7a8dd3e43b1474cbeec6a1a4e96"
ONLINE = "f9a477308c09e3baf70dc6e9330e08453662601440b4d27ade0d9a7e1e310667"
"""Of smollm2-135m as it was unpacked without and with the internet, by a flag that transformers noted: now one base."""


def unpack(folder: Path, place: Path) -> None:
    """Write a study's runs into a folder of its name in ``place``."""
    target = place / "studies" / folder.name
    target.mkdir(parents=True)
    for name in ("study.yaml", "plan.json", "chosen.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (target / name).write_text(text.replace(OFFLINE, ONLINE), encoding="utf-8")
    for name, run in runs_of(folder).items():
        (target / name).mkdir(parents=True)
        rows = [dict(zip(run["rows"], row, strict=True)) for row in zip(*run["rows"].values(), strict=True)]
        with gzip.open(target / name / "rows.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        metrics: dict[str, Any] = {key: run[key] for key in run if key not in ("rows", "name")}
        metrics |= {"samples": [], "history": []}
        text = json.dumps(metrics).replace(OFFLINE, ONLINE)
        (target / name / "metrics.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def unpacked(folder: Path) -> Iterator[Study]:
    """The study in a folder of runs, under the name that it had, in a place of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        unpack(folder, Path(place))
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
    """In every order of the seeds that all entries ran, planned in today's format: after which round the study would
    have ended, what it would have taken of each family, and its minutes as a share of those of all rounds, searches
    included. A family that has its answer runs no further."""
    with unpacked(folder) as study:
        comparison = Comparison(study, prepare(study, None))
        found, plan, families = comparison.found(), comparison.plan, study.families()
        searches = sum(len(one.losses) * plan.seconds("search", name) for name, one in comparison.chosen.items())
        seconds = {name: plan.seconds("final", name) for name in found.finals}
        seeds = [seed for seed in plan.seeds if all(seed in own for own in found.finals.values())]
        ends = [ended(found, order) for order in permutations(seeds, min(len(seeds), plan.rounds))]
        whole = searches + min(len(seeds), plan.rounds) * sum(seconds.values())

        def minutes(end: dict[str, tuple[str, int]]) -> float:
            rounds = {name: max(end[f][1] for f, own in families.items() if name in own) for name in seconds}
            return (searches + sum(rounds[name] * seconds[name] for name in seconds)) / whole

        return {
            "rounds": _counts(max(number for _, number in end.values()) for end in ends),
            "takes": _counts(
                take if len(families) == 1 else f"{family}: {take}" for end in ends for family, (take, _) in end.items()
            ),
            "minutes": fmean(map(minutes, ends)),
        }


def _counts(found: Iterable[Any]) -> dict[str, int]:
    return {str(each): number for each, number in sorted(Counter(found).items())}


def ended(found: Found, order: tuple[int, ...]) -> dict[str, tuple[str, int]]:
    """Of each family what is taken, and after which round; all of them where nothing is."""
    seeds = {"seeds": list(order), "listed": list(order), "planned": len(order)}
    as_planned = replace(found, plan=found.plan.model_copy(update={"format": FORMAT, "extensions": [], **seeds}))
    ends: dict[str, tuple[str, int]] = {}
    for number in as_planned.plan.looked_at():
        for family, budget in as_planned.budgets(number).items():
            if family not in ends and (decision := budget.decision()) is not None:
                ends[family] = str(decision.entry), number
    return {family: ends.get(family, (str(None), len(order))) for family in found.study.families()}


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
