"""Runs the studies of this folder with the code of commit 1eaf65e9, in a clone of it: it has the task and its runner.

    git clone . ../old && git -C ../old checkout 1eaf65e9        # then `make .venv/.demo-installed` there
    ../old/.venv/bin/python studies/which-k/which_k.py ../old which-k-512 [--only ENTRY ...]

They stop and resume as all studies do. The rule is in which-k-512.yaml; runs that another study has already made are
taken from there. Afterwards the runs and the report of each study are copied into studies/NAME. `--store` copies what
is finished of one into NAME.jsonl.gz here, from where the next clone goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
MADE = {"which-k-512": "phonebook-512", "which-k-csqa": "which-blocks"}
"""Studies whose runs of the entry `smoa-contiguous` are the same."""
MORE_SEEDS = "recall-blocks-512"
"""A study of the clone that gets ten more seeds of two entries."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("name")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--store", action="store_true")
    given = parser.parse_args()
    studies = given.clone.resolve() / "studies"
    sys.path.insert(0, str(studies))

    import phonebook
    import stored

    stored_runs, runs = HERE / f"{given.name}.jsonl.gz", studies / given.name / "runs.jsonl.gz"
    if given.store:
        stored.pack(runs.parent)
        shutil.copy(runs, stored_runs)
        return

    class Searched(phonebook.PhoneBook):
        """A phone book whose rates are searched at its own number of names."""

        searched = given.name

    if given.name == MORE_SEEDS:
        file, *changes = stored.OTHERWISE[MORE_SEEDS]
        changes = [change for change in changes if not change.startswith("seeds=")]
        stored.OTHERWISE[MORE_SEEDS] = (file, *changes, f"seeds={list(range(10, 23))}")
        given.only = given.only or ["smoa-k8", "smoa-k8-contiguous"]
    else:
        folder = studies / given.name
        folder.mkdir(exist_ok=True)
        shutil.copy(HERE / f"{given.name}.yaml", folder)
        if given.name != "which-k-csqa":
            stored.LAST_LAYERS[given.name] = Searched
        if stored_runs.exists() and not runs.exists():
            shutil.copy(stored_runs, runs)
        elif given.name in MADE and not runs.exists():
            take(studies / MADE[given.name], folder)
    stored.run(given.name, given.only)
    target = HERE.parent / given.name
    target.mkdir(exist_ok=True)
    for file in ("runs.jsonl.gz", "summary.json", "README.md", "differences.png"):
        shutil.copy(studies / given.name / file, target)


def take(source: Path, folder: Path) -> None:
    """Take the runs of the entry that both studies have: final ones, and the search's where it is the same."""
    with gzip.open(source / "runs.jsonl.gz", "rt") as lines:
        runs = [json.loads(line) for line in lines]
    for run in runs:
        if "/smoa-contiguous/" in run["name"]:
            path = folder / f"{run['name']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(run), encoding="utf-8")


if __name__ == "__main__":
    main()
