"""Whether a task can show a difference between methods: full fine-tuning against a small LoRA, tuned alike.

A study of it has the entries ``lora`` and ``full``, and the base model. The standard error of a difference in
accuracy is √(s_q² + s_s²): s_q over questions, of the mean over seeds; s_s over seeds, of the mean over questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from stored import final_name, runs_of, summary_of

HEADER = [
    *("task", "model", "seeds", "untouched %", "LoRA's r", "LoRA %", "full %", "better of both − untouched", "moves"),
    *("full − LoRA", "standard errors", "headroom"),
]
ENOUGH = 3.0
"""Standard errors from which on a difference counts."""


class Gain(NamedTuple):
    """A difference in accuracy with its standard error."""

    mean: float
    stderr: float

    @property
    def is_clear(self) -> bool:
        return self.mean >= ENOUGH * self.stderr

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ± {100 * self.stderr:.1f}"


def gain(after: NDArray[np.float64], before: NDArray[np.float64]) -> Gain:
    """Both are (seeds, questions), 1 where the answer is right; paired, or with the one seed of ``before``."""
    gaps = after - before
    seeds, questions = gaps.shape
    of_questions = gaps.mean(axis=0).std(ddof=1) / questions**0.5
    of_seeds = gaps.mean(axis=1).std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    return Gain(float(gaps.mean()), float(np.hypot(of_questions, of_seeds)))


def is_of_headroom(folder: Path) -> bool:
    summary = summary_of(folder)
    return isinstance(summary, list) and {row["entry"] for row in summary} >= {"lora", "full"}


def line(folder: Path) -> list[str]:
    """The row of a study under ``HEADER``."""
    runs, rows = runs_of(folder), {row["entry"]: row for row in summary_of(folder)}
    seeds = sorted({*rows["lora"]["seeds"]} & {*rows["full"]["seeds"]})
    names = {
        "untouched": ["untouched"],
        **{
            entry: [final_name(entry, rows[entry]["learning_rate"], seed) for seed in seeds]
            for entry in ("lora", "full")
        },
    }
    right = {who: np.array([runs[name]["questions"]["right"] for name in own], float) for who, own in names.items()}
    shares = {who: own.mean() for who, own in right.items()}
    moved = gain(right["lora" if shares["lora"] >= shares["full"] else "full"], right["untouched"])
    gained = gain(right["full"], right["lora"])
    config = runs[names["full"][0]]["config"]
    return [
        ", ".join(config["data"]["tasks"]),
        config["model"]["name"],
        str(len(seeds)),
        f"{100 * shares['untouched']:.1f}",
        str(runs[names["lora"][0]]["config"]["adapter"]["r"]),
        f"{100 * shares['lora']:.1f}",
        f"{100 * shares['full']:.1f}",
        str(moved),
        "yes" if moved.is_clear else "no",
        str(gained),
        f"{gained.mean / gained.stderr:.1f}",
        "yes" if moved.is_clear and gained.is_clear else "no",
    ]
