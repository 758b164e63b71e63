"""Runs a part of the tests against several versions of PEFT and transformers, one virtual environment at a time.

    python -m tests.slow.versions                       # every row
    python -m tests.slow.versions --short               # few tests with the oldest and the newest versions
    python -m tests.slow.versions "axolotl 0.19.0" …    # the rows of these names, with or without --short

Each environment borrows the packages of the one that runs this, except those of its row and what these need in another
version. It is deleted afterwards. Every row also loads the adapters that the rows before it have saved, bit for bit
(exchange.py); the first to save is the installed version. A row of the installed versions runs nothing.
"""

import argparse
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.slow.processes import build_environment, run_python

ROWS = {
    "oldest": ["peft==0.18.1", "transformers==5.0.*", "kernels<0.11"],
    "LLaMA-Factory 0.9.5": ["peft>=0.18,<=0.18.1", "transformers<=5.6", "kernels<0.13"],
    "PEFT 0.19": ["peft==0.19.*", "transformers==5.12.*", "kernels<0.13"],
    "axolotl 0.19.0": ["peft==0.20.0", "transformers==5.16.1", "trl==1.9.0"],
    "ms-swift 4.6.0": ["peft<0.21", "transformers<5.20"],
    "unsloth 2026.10": ["peft<0.22", "transformers<=5.17"],
    "axolotl 0.21.0": ["peft==0.21.2", "transformers==5.20.1", "trl==1.14.1"],
    "before 5.24": ["peft==0.21.*", "transformers<5.24"],
    "newest": ["peft<0.22", "transformers"],
    "newest with TRL": ["peft<0.22", "transformers", "trl"],
    "torch 2.15": ["torch==2.15.*"],
}
"""What pip is asked for, with `--upgrade`: the oldest, the newest, what frameworks demand, and a torch that nothing
demands, for the weekly workflow. Older transformers
don't import beside a newer `kernels`, which pip has brought with the newest."""
SHORT = ["oldest", "newest"]
LIVES = [
    "tests/smoa/test_registration.py",
    "tests/smoa/test_mixed_batch.py",
    "tests/lives/test_architectures.py::test_a_model_is_a_no_op_then_learns_then_is_saved_loaded_and_merged",
    "tests/lives/test_architectures.py::test_an_adapter_lives_through_training_loading_merging_and_training_again",
]
"""Inject, train, save, load, merge, mixed batches."""
SHORT_PART = [*LIVES, "tests/smoa/test_model.py::test_transformers_own_adapter_interface_takes_smoa"]
PART = [
    *LIVES,
    "tests/smoa/test_layer.py",
    "tests/smoa/test_merging.py",
    "tests/smoa/test_model.py",
    "tests/smoa/test_loading.py",
    "tests/smoa_lab/config/test_run.py",
]
TRL_PART = ["tests/project/test_examples.py::test_an_example_runs[trl_trainers.py]"]
"""For rows that name a version of TRL."""


PACKAGES = ["peft", "transformers", "trl", "torch"]
"""What the rows differ in."""
AS_INSTALLED = "as installed, where every test runs"


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    row: str
    versions: list[str]
    tests: str
    exchanged: str
    seconds: float

    @property
    def is_good(self) -> bool:
        if self.tests == AS_INSTALLED:
            return True
        return "passed" in self.tests and not re.search("failed|error", self.tests) and self.exchanged == "bit-equal"

    def __str__(self) -> str:
        return f"| {' | '.join([self.row, *self.versions, self.tests, self.exchanged, f'{self.seconds:.0f}'])} |"


def versions(python: Path | str, packages: list[str]) -> list[str]:
    """What an environment has of these packages."""
    ask = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]), sep='\\n')"
    return run_python(python, "-c", ask, *packages).stdout.split()


def exchange(python: Path | str, name: str, adapters: Path) -> str:
    """Save adapters under this name, then load all that have been saved."""
    result = run_python(python, "-m", "tests.lives.exchange", str(adapters), name)
    return result.stderr.strip().splitlines()[-1] if result.returncode else "bit-equal"


def outcome(row: str, tests: list[str], room: Path) -> Outcome:
    """Build an environment, run the tests in it and delete it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=room) as folder:
        try:
            python = build_environment(Path(folder), "--upgrade", *ROWS[row])
        except RuntimeError as error:  # the other rows say what they do all the same
            print(error)  # noqa: T201
            return Outcome(row, ["–", "–"], "can't be installed", "–", time.monotonic() - start)
        found = versions(python, PACKAGES)
        if found == versions(sys.executable, PACKAGES):
            return Outcome(row, found[:2], AS_INSTALLED, "–", time.monotonic() - start)
        result = run_python(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *tests)
        if result.returncode:
            print(result.stdout)  # noqa: T201
        summary = re.sub(r" in [\d.:() s]+$", "", (result.stdout.strip() or "nothing ran").splitlines()[-1])
        exchanged = exchange(python, row, room / "adapters")
        return Outcome(row, found[:2], summary, exchanged, time.monotonic() - start)


def main() -> int:
    """Print the table; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW")  # []: none given
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    done = []
    with tempfile.TemporaryDirectory() as room:
        exchange(sys.executable, "installed", Path(room) / "adapters")
        for row in arguments.rows or (SHORT if arguments.short else ROWS):
            trl = TRL_PART if any(wanted.startswith("trl") for wanted in ROWS[row]) else []
            done.append(outcome(row, [*(SHORT_PART if arguments.short else PART), *trl], Path(room)))
            print(done[-1], flush=True)  # noqa: T201
    print("\n| | PEFT | transformers | tests | adapters of the others | seconds |\n|---|---|---|---|---|---|")  # noqa: T201
    print(*done, sep="\n")  # noqa: T201
    return 0 if all(one.is_good for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
