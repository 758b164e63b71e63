"""Differences between two entries, paired by seed and by row, with 95 % intervals.

Rows are resampled (bootstrap). Seeds are too few for that: three of them, resampled, span no more than their own
smallest and largest, which leave a true difference of 0 out one time in four. So the mean over seeds is given an error
of Student's t with seeds - 1 degrees of freedom, in units of its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Verdict = Literal["better", "same", "worse", "one seed", "open"]
"""``open``: the worse one's best rate lies at the edge of its search, so that it may do better beyond."""
RESAMPLES = 4000
AT_ONCE = 100
"""Resamples that are drawn together."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Difference:
    """An entry's value minus the reference's, the mean over seeds and rows with its 95 % interval. One seed says
    nothing of how seeds differ, so it gets no verdict.

    ``p`` is two-sided and never below 2 / (resamples + 1), ``holm_p`` corrected for all comparisons of a table that get
    a verdict by their interval, and ``holm_verdict`` the verdict by it. Where a run diverged, or two have equal values
    throughout, there is no p-value, and the verdict stands.
    """

    mean: float
    low: float
    high: float
    verdict: Verdict
    p: float | None = None
    holm_p: float | None = None
    holm_verdict: Verdict | None = None

    @property
    def final(self) -> Verdict:
        """The verdict with Holm's correction."""
        return self.holm_verdict or self.verdict

    @property
    def label(self) -> str:
        """The verdict as text, with the corrected one where the two differ."""
        return self.verdict if self.final == self.verdict else f"{self.verdict} (Holm: {self.final})"

    def signed(self, scale: float, digits: int) -> str:
        """``mean [low, high]`` as text, with their signs; of a run that diverged there are none."""
        if not math.isfinite(self.mean):
            return "diverged"
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def paired_difference(entry: Floats, reference: Floats, weights: Floats, sign: int) -> Difference:
    """Σ (entry - reference) / Σ weights over seeds and rows, (seeds, rows) and (rows,); ``sign`` is 1 where higher is
    better, else -1. A value of a run that diverged is not finite, and then the other run is the better one."""
    diverged = not np.isfinite(entry).all(), not np.isfinite(reference).all()
    if any(diverged):
        nan = float("nan")
        return Difference(nan, nan, nan, "same" if all(diverged) else "worse" if diverged[0] else "better")
    gaps = entry - reference
    if not gaps.any():  # nothing to test
        return Difference(0.0, 0.0, 0.0, "same" if len(gaps) > 1 else "one seed")
    mean, samples = float(gaps.mean(axis=0).sum() / weights.sum()), _resampled(gaps, weights)
    low, high = map(float, np.percentile(samples, [2.5, 97.5]))
    verdict: Verdict = "same" if low <= 0 <= high else "better" if sign * low > 0 else "worse"
    beyond = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(samples) + 1))
    return Difference(mean, low, high, "one seed" if len(gaps) < 2 else verdict, p)


def _resampled(values: Floats, weights: Floats) -> Floats:
    """Resamples of Σ values / Σ weights, (RESAMPLES,)."""
    rows = values.shape[1]
    of_row = values.mean(axis=0)
    random = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = random.integers(0, rows, (AT_ONCE, rows))
        means.append(of_row[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return np.asarray(np.concatenate(means) + seed_errors(values.sum(axis=1) / weights.sum(), random))


def seed_errors(of_seed: Floats, random: np.random.Generator) -> Floats:
    """Errors of the mean over seeds, (RESAMPLES,), in random order; 0 for one seed, which shows none."""
    seeds = len(of_seed)
    if seeds < 2:
        return np.zeros(RESAMPLES)
    many = np.sort(random.standard_t(seeds - 1, 101 * RESAMPLES))
    return np.asarray(random.permutation(many[50::101]) * of_seed.std(ddof=1) / seeds**0.5)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with Holm's p-values for all of them together, and the verdicts by these: those below 5 % are
    false in at most 5 % of studies with so many comparisons. Those without a verdict by their interval stay as they
    are."""
    known = sorted(
        (each.p, place) for place, each in enumerate(differences) if each.verdict != "one seed" and each.p is not None
    )
    changed, least = list(differences), 0.0
    for rank, (p, place) in enumerate(known):
        each = differences[place]
        least = max(least, min(1.0, p * (len(known) - rank)))
        lost = each.verdict in ("better", "worse") and least >= SIGNIFICANT
        changed[place] = replace(each, holm_p=least, holm_verdict="same" if lost else each.verdict)
    return changed
