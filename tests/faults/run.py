"""Faults of `smoa.toml` and `smoa_lab.toml`, planted one at a time into a copy of src, and which tests fail then.

    python -m tests.faults.run                             # check that each fault still fits the source
    python -m tests.faults.run --near lines.jsonl          # run the tests near each, until one fails
    python -m tests.faults.run --near lines.jsonl --all    # all tests near each, and every one that fails
    python -m tests.faults.run --only scale-twice -- python -m tests.lives --minutes 15

The tests near `smoa/kernels/blocks.py` are tests/smoa/kernels/test_blocks.py, the rest of that folder, tests/smoa and
tests/lives; of these the lab has test_studies.py. A file of outcomes is continued: a fault that it has is not planted
again.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src"
BEFORE = ("torch", "transformers", "peft", "accelerate", "hypothesis")
"""What is imported once, before a process for each fault imports smoa and runs tests."""


class Fault(NamedTuple):
    """One edit of a file: `old`, which stands there once, becomes `new`; `why` says what is right."""

    name: str
    file: str
    old: str
    new: str
    why: str

    def fits(self) -> bool:
        """Whether it can be planted."""
        path = SOURCE / self.file
        return path.exists() and path.read_text(encoding="utf-8").count(self.old) == 1

    def near(self) -> list[str]:
        """The tests near it: those of the file, of its folders from the innermost, and of lives."""
        file = Path(self.file)
        own = TESTS / file.parent / f"test_{file.stem}.py"
        folders = [TESTS / folder for folder in (file.parent, *file.parent.parents) if folder.name]
        lives = TESTS / "lives" if file.parts[0] == "smoa" else TESTS / "lives" / "test_studies.py"
        places = [own, *folders, lives]
        return [str(place) for place in places if place.exists()]

    @contextmanager
    def planted(self) -> Iterator[Path]:
        """A copy of src with the edit."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "src")
            shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
            path = source / self.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(self.old, self.new), encoding="utf-8")
            yield source


def read_faults() -> list[Fault]:
    """All faults; an error names those that do not fit."""
    faults = []
    for package in ("smoa", "smoa_lab"):
        text = Path(__file__).with_name(f"{package}.toml").read_text(encoding="utf-8")
        faults += [Fault(**each) for each in tomllib.loads(text)["fault"]]
    wrong = [f"{fault.name} ({fault.file})" for fault in faults if not fault.fits()]
    if wrong:
        sys.exit(f"`old` does not stand in the file once: {', '.join(wrong)}")
    return faults


class Failures:
    """Notes which tests fail."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.names.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


def caught_by(fault: Fault, limit: float, all_of_them: bool) -> list[str]:
    """The tests near a fault that fail, run in a fork of this process."""
    with fault.planted() as source, tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        if (process := os.fork()) == 0:
            _run_near(fault, source, said, all_of_them)
        end = time.monotonic() + limit
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(process, 9)
                os.waitpid(process, 0)
                return ["no test: it hangs"]
            time.sleep(0.1)
        said.seek(0)
        outcome: list[str] = json.loads(said.read() or '["no test: it crashes"]')
        return outcome


def _run_near(fault: Fault, source: Path, said: Any, all_of_them: bool) -> None:
    os.environ["PYTHONPATH"] = str(source)
    sys.path.insert(0, str(source))
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        failures = Failures()
        options = ["-q", "-p", "no:cacheprovider", "--assert=plain"]  # what is imported can't be rewritten
        try:
            if all_of_them:
                pytest.main([*options, *fault.near()], plugins=[failures])
            else:
                for place in fault.near():  # collected one after the other, as most faults need but one
                    if not failures.names:
                        pytest.main([*options, "-x", place], plugins=[failures])
            json.dump(sorted(set(failures.names)), said)
            said.flush()
        finally:
            os._exit(0)


def run_near(faults: list[Fault], file: Path, limit: float, all_of_them: bool) -> None:
    """Append a line for each fault that the file does not have yet."""
    known = [json.loads(line)["fault"] for line in file.read_text().splitlines()] if file.exists() else []
    for module in BEFORE:
        importlib.import_module(module)
    for fault in faults:
        if fault.name not in known:
            started = time.monotonic()
            row = {"fault": fault.name, "file": fault.file, "caught by": caught_by(fault, limit, all_of_them)}
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row | {"seconds": round(time.monotonic() - started)}) + "\n")


def run_command(faults: list[Fault], command: list[str], limit: float) -> None:
    """Run a command with each fault in place of src, and print whether it failed."""
    for fault in faults:
        with fault.planted() as source:
            try:
                environment = os.environ | {"PYTHONPATH": str(source)}
                code = subprocess.run(command, env=environment, timeout=limit, check=False).returncode
                outcome = "found" if code else "missed"
            except subprocess.TimeoutExpired:
                outcome = "timeout"
            print(f"{fault.name}: {outcome}", flush=True)  # noqa: T201


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this fault; may be given several times")
    parser.add_argument("--file", action="append", help="only faults whose file begins so, such as smoa/kernels")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for each")
    parser.add_argument(
        "--near", type=Path, metavar="FILE", help="run the tests near each; a line of JSON each goes here"
    )
    parser.add_argument("--all", action="store_true", help="do not stop at the first test that fails")
    parser.add_argument("command", nargs="*", help="after --: what may find them")
    given = parser.parse_args(arguments)
    faults = read_faults()
    chosen = [
        fault
        for fault in faults
        if fault.name in (given.only or [fault.name]) and fault.file.startswith(tuple(given.file or [""]))
    ]
    if given.near is not None:
        run_near(chosen, given.near, given.limit, given.all)
    elif given.command:
        run_command(chosen, given.command, given.limit)
    else:
        print(f"{len(chosen)} faults fit the source")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
