"""Plants small faults in a copy of the lab, one at a time, and notes which test finds each.

    python -m tests.planted_lab found.jsonl [--place data] [--tree FOLDER]

``found.jsonl`` gets a line for each fault: its place, its reason, the test that found it or null, and the seconds.
A second call goes on where the first one ended. ``--tree`` is a checkout whose source and tests are taken, by default
this one. Before tests of a place are merged or removed, its faults are planted; afterwards the same ones are found.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import tomllib
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
UNIT, WHOLE = "tests/unit/smoa_lab/", "tests/integration/"
PLACES = {
    "data": [f"{UNIT}data"],
    "training": [
        *(f"{UNIT}training", f"{UNIT}scoring", f"{WHOLE}test_resuming.py", f"{WHOLE}test_killed_runs.py"),
        *(f"{WHOLE}test_precision.py", f"{WHOLE}test_quantized_lab.py", f"{WHOLE}test_what_was_trained.py"),
    ],
    "study": [f"{UNIT}study", f"{WHOLE}test_compare.py"],
    "pages": [
        *(f"{UNIT}test_merge.py", f"{UNIT}test_convert.py", f"{UNIT}test_open_run.py", f"{UNIT}test_inspect.py"),
        *(f"{UNIT}test_run_page.py", f"{UNIT}pages", f"{WHOLE}test_verify.py", f"{WHOLE}test_what_was_trained.py"),
        *(f"{WHOLE}test_lab_commands.py", f"{WHOLE}test_demo_smoke.py"),
    ],
    "config": [
        *(f"{UNIT}config", f"{UNIT}basics", f"{UNIT}test_base_models.py", f"{UNIT}test_budget.py"),
        *(f"{UNIT}test_chat.py", f"{UNIT}cli", f"{UNIT}test___main__.py", f"{UNIT}training/test_refused_runs.py"),
    ],
}
"""The tests of each place, of which those named as the file with the fault run first."""
FIRST = {
    "loaded_run": "trainer",
    "evaluate": "train",
    "planning": "plan",
    "decision": "verdict",
    "progress": "run_study",
    "results": "study_report",
    "executor": "run_study",
    "base_models": "base_model",
    "run_report": "pages",
    "tables": "pages",
    "templates": "pages",
    "card": "pages",
    "validation": "run",
    "folders": "basics",
    "plain": "basics",
}
"""Files of source whose tests have another name."""
SECONDS = 300
"""Of computing that the tests of a fault may take: one that lets them loop for ever was found."""


class Fault(NamedTuple):
    """In ``file`` of src/smoa_lab, ``old``, which stands there once, becomes ``new``. Files with ``tests`` in the name
    run first, by default those named as ``file``."""

    place: str
    file: str
    old: str
    new: str
    reason: str
    tests: str = ""

    def plant(self, source: Path) -> None:
        path = source / "smoa_lab" / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.reason}: stands {text.count(self.old)} times in {self.file}"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


FAULTS = [
    Fault(place, **values)
    for place, faults in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()
    for values in faults
]


class Finder:
    """Keeps the first test that fails."""

    found: str | None = None
    number = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.number += report.when == "call"
        if report.failed and self.found is None:
            self.found = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.found is None:
            self.found = report.nodeid


def tests_of(fault: Fault, tree: Path) -> list[list[str]]:
    """The files of a place that are named as the file with the fault, and the others."""
    files = []
    for place in PLACES[fault.place]:
        files += sorted((tree / place).rglob("test_*.py")) if (tree / place).is_dir() else [tree / place]
    stem = Path(fault.file).stem
    wanted = fault.tests or FIRST.get(stem, stem)
    named = [str(file.relative_to(tree)) for file in files if wanted in file.name]
    return [named, [name for file in files if (name := str(file.relative_to(tree))) not in named]]


def _test(fault: Fault, tree: Path, source: Path, told: Path, known: str | None) -> None:
    """What the process of a fault does, which ends with it."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(source)
    ours = ("", str(ROOT), str(ROOT / "src"))
    sys.path[:] = [str(source), str(tree), *(each for each in sys.path if each not in ours)]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    finder, busy = Finder(), time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    try:
        for tests in [[known] if known else [], *tests_of(fault, tree)]:
            if tests and not (finder.found and finder.number):
                finder.found = None
                pytest.main([*options, *tests], plugins=[finder])
        told.write_text(
            json.dumps({"found_by": finder.found, "tests": finder.number, "cpu": round(time.process_time() - busy, 1)}),
            encoding="utf-8",
        )
    finally:
        os._exit(0)


def find(fault: Fault, tree: Path, known: str | None) -> dict[str, Any]:
    """Plant a fault and run its place's tests, first the one that is ``known`` to find it, in a process of their own,
    which has what they import already."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        source, told = Path(room, "src"), Path(room, "told.json")
        shutil.copytree(tree / "src", source)
        fault.plant(source)
        child = os.fork()
        if child == 0:
            _test(fault, tree, source, told, known)
        _, status = os.waitpid(child, 0)
        ended = os.WIFSIGNALED(status) and not told.is_file()
        assert ended or told.is_file(), f"{fault.reason}: its tests could not be run"
        known_now = {"found_by": "the time limit", "tests": None} if ended else json.loads(told.read_text())
    return {"place": fault.place, "reason": fault.reason, **known_now, "seconds": round(time.monotonic() - began, 1)}


def in_turns() -> list[Fault]:
    """Those of all places in turns, so that a run that is ended early has some of each."""
    by_place = ([fault for fault in FAULTS if fault.place == place] for place in PLACES)
    return [fault for turn in zip_longest(*by_place) for fault in turn if fault is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--place", choices=PLACES)
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument(
        "--after", type=Path, help="an earlier table, whose tests run first; faults that it lacks aren't planted"
    )
    given = parser.parse_args()
    lines = given.table.read_text(encoding="utf-8").splitlines() if given.table.is_file() else []
    known = {(line["place"], line["reason"]) for line in map(json.loads, lines)}
    earlier = given.after.read_text(encoding="utf-8").splitlines() if given.after else []
    before = {(line["place"], line["reason"]): line["found_by"] for line in map(json.loads, earlier)}
    import datasets  # noqa: F401 - before the fork: they take seconds, and no fault is in them
    import peft  # noqa: F401
    import scipy.special  # noqa
    import transformers  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    sys.path.insert(0, str(given.tree / "src"))
    import smoa  # noqa: F401 - the library has no fault

    assert "smoa_lab" not in sys.modules
    for fault in in_turns():
        name = fault.place, fault.reason
        wanted = given.place in (None, fault.place) and (given.after is None or name in before)
        if wanted and name not in known:
            line = find(fault, given.tree.resolve(), before.get(name))
            with given.table.open("a", encoding="utf-8") as table:
                table.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
