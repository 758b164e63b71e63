"""Faults, planted one at a time into a copy of src, and whether something finds them. `tests/mutants.toml` has them.

    python -m tests.mutants                                    # list them, and check that each still fits the source
    python -m tests.mutants --near tests.jsonl --place maths   # the tests near each, until one fails
    python -m tests.mutants --only unmerge-restores-one -- python -m tests.states --minutes 15

A command finds a fault if it fails within the limit. With `--near FILE` or `--table FILE` outcomes are kept, and a run
that was stopped goes on.
"""

import argparse
import importlib
import json
import os
import resource
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

SOURCE = Path(__file__).parents[1] / "src"
KNOWN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NEAR: dict[str, list[str]] = KNOWN["near"]
BEFORE = ("torch", "transformers", "peft", "accelerate", "hypothesis")
"""What is imported once, before a process for each mutant imports smoa and runs tests."""


class Mutant(NamedTuple):
    """One edit of a file: `old`, which stands there once, becomes `new`. The `first` came before tests/states."""

    name: str
    place: str
    file: str
    old: str
    new: str
    why: str
    first: bool = False

    def fits(self) -> bool:
        """Whether it can be planted."""
        path = SOURCE / self.file
        return path.exists() and path.read_text(encoding="utf-8").count(self.old) == 1

    @contextmanager
    def planted(self) -> Iterator[Path]:
        """A copy of src with the edit."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "src")
            shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
            path = source / self.file
            text = path.read_text(encoding="utf-8")
            assert text.count(self.old) == 1, f"{self.name}: stands {text.count(self.old)} times in {self.file}"
            path.write_text(text.replace(self.old, self.new), encoding="utf-8")
            yield source


MUTANTS = [Mutant(**each) for each in KNOWN["mutant"]]


def run(mutant: Mutant, command: list[str], limit: float) -> str:
    """Run a command with the mutant in place of smoa: "found", "missed" or "timeout", and seconds of a processor."""
    with mutant.planted() as source:
        before, environment = processor_seconds(), os.environ | {"PYTHONPATH": str(source)}
        try:
            code = subprocess.run(command, env=environment, timeout=limit, check=False).returncode
            found = "found" if code else "missed"
        except subprocess.TimeoutExpired:
            found = "timeout"
        return f"{found} after {processor_seconds() - before:.0f} s"


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class FirstFailure:
    """Notes which test fails."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


def caught_by(mutant: Mutant, limit: float) -> str | None:
    """The first of the tests near a mutant that fails, run in a fork of this process; None if all pass."""
    with mutant.planted() as source, tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        if (process := os.fork()) == 0:
            _run_near(mutant, source, said)
        end = time.monotonic() + limit
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(process, 9)
                os.waitpid(process, 0)
                return "no test: it hangs"
            time.sleep(0.1)
        said.seek(0)
        outcome: str | None = json.loads(said.read() or '"no test: it crashes"')
        return outcome


def _run_near(mutant: Mutant, source: Path, said: Any) -> None:
    os.environ["PYTHONPATH"] = str(source)
    sys.path.insert(0, str(source))
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        failure = FirstFailure()
        try:
            options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain"]  # what is imported can't be rewritten
            for tests in NEAR[mutant.file]:  # collected one after the other, as most mutants need but one
                if failure.name is None:
                    pytest.main([*options, tests], plugins=[failure])
            json.dump(failure.name, said)
            said.flush()
        finally:
            os._exit(0)


def run_near(mutants: list[Mutant], file: Path, limit: float) -> None:
    """Append a line for each mutant that the file does not have yet."""
    known = [json.loads(line)["mutant"] for line in file.read_text().splitlines()] if file.exists() else []
    for module in BEFORE:
        importlib.import_module(module)
    for mutant in mutants:
        if mutant.name not in known:
            started = time.monotonic()
            row = {"mutant": mutant.name, "place": mutant.place, "caught by": caught_by(mutant, limit)}
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row | {"seconds": round(time.monotonic() - started)}) + "\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this mutant; may be given several times")
    parser.add_argument("--place", action="append", help="only mutants of this place")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for each")
    parser.add_argument("--near", type=Path, help="run the tests near each mutant, and keep a line of JSON here")
    parser.add_argument("--table", type=Path, help="a JSON file of a command's outcomes; what it has is not run again")
    parser.add_argument("--column", default="command", help="what the command is called there")
    parser.add_argument("command", nargs="*", help="after --: what may find them; without one, they are listed")
    given = parser.parse_args(arguments)
    names, places = given.only, given.place
    chosen = [
        each for each in MUTANTS if each.name in (names or [each.name]) and each.place in (places or [each.place])
    ]
    if given.near is not None:
        run_near(chosen, given.near, given.limit)
        return
    table = json.loads(given.table.read_text()) if given.table is not None and given.table.exists() else {}
    for mutant in chosen:
        row = table.setdefault(mutant.name, {})
        if not given.command:
            print(f"{mutant.place:8} {mutant.name:24} {row or ('fits' if mutant.fits() else 'DOES NOT FIT')}")  # noqa: T201
        elif given.column not in row:
            row[given.column] = run(mutant, given.command, given.limit)
            print(f"{mutant.name}: {row[given.column]}", flush=True)  # noqa: T201
            if given.table is not None:
                given.table.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
