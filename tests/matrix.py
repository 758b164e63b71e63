"""Runs a short part of the tests against several versions of PEFT, one virtual environment at a time.

    python -m tests.matrix [0.18.1 0.20.0 …]

Each environment borrows the packages of the one that runs this, except PEFT, transformers and what these need in
another version. It is deleted afterwards. Every version also loads the adapters that the versions before it have saved,
bit for bit (exchange.py); the first to save is the installed one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.venvs import ROOT, borrowing_venv

VERSIONS = {"0.18.1": "5.3.*", "0.19.1": "5.6.*", "0.20.0": "5.16.1", "0.21.2": "5.23.*", "newest": "newest"}
"""PEFT, and a transformers that takes it. "newest" is what pip finds within pyproject.toml's limits for tests."""
TESTS = [
    "tests/unit/smoa/test_compat.py",
    "tests/unit/smoa/test_registration.py",
    "tests/unit/smoa/test_training.py",
    "tests/unit/smoa/test_merging_in_place.py",
    "tests/unit/smoa/tuner/test_model.py",
    "tests/unit/smoa/files/test_loading.py",
]
"""Inject, train, save, load, merge, mixed batches."""


@dataclass(frozen=True)
class Outcome:
    """One row of the table."""

    peft: str
    transformers: str
    tests: str
    exchanged: str
    seconds: float

    @property
    def is_good(self) -> bool:
        return "passed" in self.tests and "failed" not in self.tests and self.exchanged == "bit-equal"


def run(python: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process that imports smoa from this checkout."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def build(folder: Path, peft: str, transformers: str) -> Path:
    """The Python of a new environment with these versions on top of the packages that this one has."""
    if peft == "newest":
        return borrowing_venv(folder, "--upgrade", "peft", "transformers<5.24")
    return borrowing_venv(folder, f"peft=={peft}", f"transformers=={transformers}")


def exchange(python: Path | str, name: str, adapters: Path) -> str:
    """Save adapters, then load all that have been saved."""
    results = [run(python, "-m", "tests.exchange", "save", str(adapters / name))]
    results += [run(python, "-m", "tests.exchange", "check", str(folder)) for folder in sorted(adapters.iterdir())]
    bad = [result.stderr.strip().splitlines()[-1] for result in results if result.returncode]
    return "; ".join(bad) or "bit-equal"


def outcome(peft: str, transformers: str, room: Path) -> Outcome:
    """Build an environment, run the tests in it and delete it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=room) as folder:
        python = build(Path(folder), peft, transformers)
        found = run(
            python, "-c", "import peft, transformers as t; print(peft.__version__, t.__version__)"
        ).stdout.split()
        result = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
        if result.returncode:
            print(result.stdout)  # noqa: T201
        summary = re.sub(r" in [\d.:() s]+$", "", (result.stdout.strip() or "nothing ran").splitlines()[-1])
        return Outcome(*found, summary, exchange(python, peft, room / "adapters"), time.monotonic() - start)


def main(chosen: list[str]) -> int:
    """Print the table; 1 if anything failed."""
    rows = []
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / "adapters").mkdir()
        exchange(sys.executable, "installed", Path(room) / "adapters")
        for peft in chosen or VERSIONS:
            rows.append(outcome(peft, VERSIONS.get(peft, "newest"), Path(room)))
            print(f"{peft}: {rows[-1].tests}", flush=True)  # noqa: T201
    print("\n| PEFT | transformers | tests | adapters of the others | seconds |\n|---|---|---|---|---|")  # noqa: T201
    for row in rows:
        print(f"| {row.peft} | {row.transformers} | {row.tests} | {row.exchanged} | {row.seconds:.0f} |")  # noqa: T201
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
