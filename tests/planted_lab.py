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
import shutil
import signal
import sys
import tempfile
import time
import tomllib
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
SECONDS = 600
"""How long the tests of a fault may take: one that lets them wait for ever was found."""


class Fault(NamedTuple):
    """In ``file`` of src/smoa_lab, ``old``, which stands there once, becomes ``new``."""

    place: str
    file: str
    old: str
    new: str
    reason: str

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


def tests_of(fault: Fault, tree: Path) -> list[str]:
    """Files of a place, those first that are named as the file with the fault."""
    files = []
    for place in PLACES[fault.place]:
        files += sorted((tree / place).rglob("test_*.py")) if (tree / place).is_dir() else [tree / place]
    stem = Path(fault.file).stem
    first = [file for file in files if stem.removesuffix("s") in file.stem]
    return [str(file.relative_to(tree)) for file in [*first, *(file for file in files if file not in first)]]


def _test(fault: Fault, tree: Path, source: Path, told: Path) -> None:
    """What the process of a fault does, which ends with it."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(source)
    ours = ("", str(ROOT), str(ROOT / "src"))
    sys.path[:] = [str(source), str(tree), *(each for each in sys.path if each not in ours)]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    finder = Finder()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    try:
        pytest.main([*options, *tests_of(fault, tree)], plugins=[finder])
        told.write_text(json.dumps({"found_by": finder.found, "tests": finder.number}), encoding="utf-8")
    finally:
        os._exit(0)


def find(fault: Fault, tree: Path) -> dict[str, Any]:
    """Plant a fault and run its place's tests in a process of their own, which has what they import already."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        source, told = Path(room, "src"), Path(room, "told.json")
        shutil.copytree(tree / "src", source)
        fault.plant(source)
        child = os.fork()
        if child == 0:
            _test(fault, tree, source, told)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.1)
            if time.monotonic() - began > SECONDS:
                os.kill(child, signal.SIGKILL)
        ended = time.monotonic() - began > SECONDS
        assert ended or told.is_file(), f"{fault.reason}: its tests could not be run"
        known = json.loads(told.read_text()) if told.is_file() else {"found_by": "the time limit", "tests": None}
    return {"place": fault.place, "reason": fault.reason, **known, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--place", choices=PLACES)
    parser.add_argument("--tree", type=Path, default=ROOT)
    given = parser.parse_args()
    lines = given.table.read_text(encoding="utf-8").splitlines() if given.table.is_file() else []
    known = {(line["place"], line["reason"]) for line in map(json.loads, lines)}
    import datasets  # noqa: F401 - before the fork: they take seconds, and no fault is in them
    import peft  # noqa: F401
    import transformers  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    for fault in FAULTS:
        if (fault.place, fault.reason) not in known and given.place in (None, fault.place):
            line = find(fault, given.tree.resolve())
            with given.table.open("a", encoding="utf-8") as table:
                table.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
