"""Whether a task can show a difference between methods: full fine-tuning against a small LoRA, tuned alike.

A study of it has the entries ``lora`` and ``full``, and the untouched model. The standard error of a difference in
accuracy is √(s_q² + s_s²): s_q over questions, of the mean over seeds; s_s over seeds, of the mean over questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoa.errors import DataError
from smoa_lab.study.report.results.statistics import Outcomes, outcomes
from smoa_lab.study.trials import TrialStore

HEADROOM_HEADER = [
    *("task", "model", "seeds", "untouched %", "LoRA's r", "LoRA %", "full %", "better of both − untouched", "moves"),
    *("full − LoRA", "standard errors", "headroom"),
]
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


def headroom_line(folder: Path) -> list[str]:
    """The row of a study under ``HEADROOM_HEADER``.

    Raises:
        DataError: a run of ``lora`` or ``full``, or the untouched model is missing.
    """
    store = TrialStore(folder)
    runs = {name: [store.find(one) for one in store.names(f"final/{name}/")] for name in ("lora", "full")}
    untouched = store.find("untouched")
    known = {name: [run for run in found if run is not None] for name, found in runs.items()}
    if untouched is None or not all(known.values()):
        raise DataError(f"{folder}: headroom needs the untouched model and final runs of lora and full; run the study")
    seeds = min(map(len, known.values()))
    before, (lora, full) = outcomes([untouched]), (outcomes(found[:seeds]) for found in known.values())
    best = max(lora, full, key=lambda one: one.accuracy().mean())
    moved, gained = gain(best, before), gain(full, lora)
    config, adapter = known["full"][0]["config"], known["lora"][0]["config"]["adapter"]
    percent = [f"{100 * one.accuracy().mean():.1f}" for one in (before, lora, full)]
    return [
        ", ".join(config["data"]["tasks"]),
        config["model"]["name"],
        str(seeds),
        percent[0],
        str(adapter["r"]),
        *percent[1:],
        _signed(moved),
        "yes" if moved.is_clear else "no",
        _signed(gained),
        f"{gained.errors:.1f}",
        "yes" if moved.is_clear and gained.is_clear else "no",
    ]


def _signed(found: Gain) -> str:
    return f"{100 * found.mean:+.1f} ± {100 * found.stderr:.1f}"
