"""Curves of a sequence with known means."""

from __future__ import annotations

import numpy as np

from smoa_lab.study.report.sequence.curves import Curve, Losses

QUESTIONS = 150
RATES = [1e-3, 1e-2, 1e-1, 1.0]


def made(entry: str, second: list[float], first: list[float], seeds: int = 3, noise: float = 0.01) -> Curve:
    """A curve of these mean losses, on questions that are hard and easy, with a little noise of each run."""
    random = np.random.default_rng(len(entry))

    def losses(means: list[float], task: int) -> Losses:
        hard = np.random.default_rng(task).gamma(2.0, 1.0, QUESTIONS)
        own = random.normal(0, noise, (len(means), seeds, QUESTIONS))
        return Losses(np.array(means)[:, None, None] + hard - hard.mean() + own, np.ones(QUESTIONS))

    return Curve(entry, RATES[: len(second)], list(range(seeds)), losses(first, 0), losses(second, 1))
