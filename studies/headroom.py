"""Whether a task can show a difference between methods: full fine-tuning against a small LoRA, tuned alike.

A study of it has the entries ``lora`` and ``full``, and the untouched model. The standard error of a difference in
accuracy is √(s_q² + s_s²): s_q over questions, of the mean over seeds; s_s over seeds, of the mean over questions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoa.errors import DataError
from smoa_lab.study.statistics import Outcomes, check_paired, outcomes
from smoa_lab.study.trials import Trial, TrialStore

HEADER = [
    *("task", "model", "seeds", "untouched %", "LoRA's r", "LoRA %", "full %", "better of both − untouched", "moves"),
    *("full − LoRA", "standard errors", "headroom"),
]
_ENTRIES = {"lora", "full"}
ENOUGH = 3.0
"""Standard errors from which on a difference counts."""


@dataclass(frozen=True)
class Gain:
    """A difference in accuracy with its standard error."""

    mean: float
    stderr: float

    @property
    def errors(self) -> float:
        """The difference in standard errors."""
        return self.mean / self.stderr if self.stderr else math.copysign(math.inf, self.mean)

    @property
    def is_clear(self) -> bool:
        return self.errors >= ENOUGH


def gain(after: Outcomes, before: Outcomes) -> Gain:
    """Paired by question and by seed, or with the one seed of ``before``."""
    share = after.share / after.share.mean()
    gaps = (after.right - before.right) * share
    seeds, questions = gaps.shape
    of_questions = gaps.mean(axis=0).std(ddof=1) / questions**0.5
    of_seeds = gaps.mean(axis=1).std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    return Gain(float(gaps.mean()), float(np.hypot(of_questions, of_seeds)))


def is_of_headroom(folder: Path) -> bool:
    """Whether the study has a report with both entries."""
    return _rows(folder).keys() >= _ENTRIES


def line(folder: Path) -> list[str]:
    """The row under ``HEADER`` of a study that has a report.

    Raises:
        DataError: a run of ``lora`` or ``full`` with the same seed, or the untouched model is missing.
    """
    store = TrialStore(folder)
    untouched = store.find("untouched")
    known = {name: _runs(store, row) for name, row in _rows(folder).items() if name in _ENTRIES}
    seeds = set.intersection(*map(set, known.values())) if len(known) == len(_ENTRIES) else set()
    if untouched is None or not seeds:
        raise DataError(f"{folder}: headroom needs the untouched model and final runs of lora and full; run the study")
    for run in (run for of_entry in known.values() for run in of_entry.values()):
        check_paired(run, untouched)
    runs = {name: [of_seed[seed] for seed in sorted(seeds)] for name, of_seed in known.items()}
    before, lora, full = outcomes([untouched]), outcomes(runs["lora"]), outcomes(runs["full"])
    best = max(lora, full, key=lambda reached: reached.accuracy().mean())
    moved, gained = gain(best, before), gain(full, lora)
    config, adapter = runs["full"][0]["config"], runs["lora"][0]["config"]["adapter"]
    percent = [f"{100 * reached.accuracy().mean():.1f}" for reached in (before, lora, full)]
    return [
        ", ".join(config["data"]["tasks"]),
        config["model"]["name"],
        str(len(seeds)),
        percent[0],
        str(adapter["r"]),
        *percent[1:],
        _signed(moved),
        "yes" if moved.is_clear else "no",
        _signed(gained),
        f"{gained.errors:.1f}",
        "yes" if moved.is_clear and gained.is_clear else "no",
    ]


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the study's summary by entry; none without a report, and of a sequence."""
    file = folder / "summary.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return {row["entry"]: row for row in found} if isinstance(found, list) else {}


def _runs(store: TrialStore, row: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The final runs of an entry by seed, at the learning rate that its search chose."""
    names = {seed: Trial("final", row["entry"], row["learning_rate"], seed).name for seed in row["seeds"]}
    return {seed: run for seed, name in names.items() if (run := store.find(name)) is not None}


def _signed(found: Gain) -> str:
    return f"{100 * found.mean:+.1f} ± {100 * found.stderr:.1f}"
