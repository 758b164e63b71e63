"""Differences between two entries, paired by seed and by row, with 95 % intervals.

Rows are resampled (bootstrap). Seeds are too few for that: three of them, resampled, span no more than their own
smallest and largest, which leave a true difference of 0 out one time in four. So the mean over seeds is given an error
of Student's t. How much seeds differ is much the same for all entries of a table, whose variances are pooled:

    s² = Σ (n_e - 1) s_e² / Σ (n_e - 1)             with Σ (n_e - 1) degrees of freedom
    SE = √(2 max(s², s_ab²) / S)                    of the difference between a and b over S shared seeds, where
                                                    s_ab² is the variance of these two, pooled alike

studies/calibration.py measures how often the intervals miss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
SeedError = tuple[float, float]
"""The standard error that seeds give a difference, with the degrees of freedom of its Student's t."""


@dataclass(frozen=True)
class Difference:
    """An entry's value minus the reference's, the mean over seeds and rows with its 95 % interval. One seed that both
    have gets no verdict, and no interval (NaN) where no entry of the table has two.

    ``p`` is two-sided and never below 2 / (resamples + 1), ``holm_p`` corrected for all comparisons of a table that get
    a verdict by their interval, and ``holm_verdict`` the verdict by it. Where a run diverged, or two have equal values
    throughout, there is no p-value, and the verdict stands. ``error`` is the part of seeds in the interval.
    """

    mean: float
    low: float
    high: float
    verdict: Verdict
    p: float | None = None
    holm_p: float | None = None
    holm_verdict: Verdict | None = None
    error: SeedError = (0.0, 0.0)

    @property
    def final(self) -> Verdict:
        """The verdict with Holm's correction."""
        return self.holm_verdict or self.verdict

    @property
    def label(self) -> str:
        """The verdict as text, with the corrected one where the two differ."""
        return self.verdict if self.final == self.verdict else f"{self.verdict} (Holm: {self.final})"

    def signed(self, scale: float, digits: int) -> str:
        """``mean [low, high]`` as text, with their signs; of a run that diverged there are none, of one seed no
        interval."""
        if not math.isfinite(self.mean):
            return "diverged"
        if not math.isfinite(self.low):
            return f"{scale * self.mean:+.{digits}f}"
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


Variances = Mapping[str, tuple[float, int]]
"""The variance over its seeds of each entry of a table, with its degrees of freedom."""


def variances_of(means: Mapping[str, Floats]) -> Variances:
    """Of entries by the means of all their seeds; one seed shows none, and a run that diverged hides it."""
    return {
        name: (float(of_seed.var(ddof=1)), len(of_seed) - 1)
        for name, of_seed in means.items()
        if len(of_seed) > 1 and np.isfinite(of_seed).all()
    }


def seed_error(known: Variances, pair: Sequence[str], seeds: int) -> SeedError:
    """Of the difference of a pair, or of the mean of one, over so many seeds. Where the pair's variance exceeds that of
    the other entries beyond F's 90 % point, one wild entry may be its cause: then the pair has Welch's degrees of
    freedom, which are as few as that one's."""
    of_pair = [known[name] for name in pair if name in known]
    own, own_freedom = _pooled(of_pair)
    others, other_freedom = _pooled([each for name, each in known.items() if name not in pair])
    pooled, freedom = _pooled(list(known.values()))
    if len(of_pair) == len(pair) and other_freedom and own > _f_point(own_freedom, other_freedom, RESAMPLES) * others:
        parts = sum(variance**2 / each for variance, each in of_pair)
        freedom = round(sum(variance for variance, _ in of_pair) ** 2 / parts, 1)
    return math.sqrt(len(pair) * max(pooled, own) / max(1, seeds)), freedom


def _pooled(known: Sequence[tuple[float, int]]) -> tuple[float, float]:
    freedom = sum(each for _, each in known)
    return sum(variance * each for variance, each in known) / max(1, freedom), freedom


def paired_difference(
    entry: Floats, reference: Floats, weights: Floats, sign: int, error: SeedError, level: float = SIGNIFICANT
) -> Difference:
    """Σ (entry - reference) / Σ weights over seeds and rows, (seeds, rows) and (rows,); ``sign`` is 1 where higher is
    better, else -1. The interval misses in a share ``level``. A value of a run that diverged is not finite, and then
    the other run is the better one."""
    nan = float("nan")
    diverged = not np.isfinite(entry).all(), not np.isfinite(reference).all()
    if any(diverged):
        return Difference(nan, nan, nan, "same" if all(diverged) else "worse" if diverged[0] else "better")
    gaps = entry - reference
    if not gaps.any():  # nothing to test
        return Difference(0.0, 0.0, 0.0, "same" if len(gaps) > 1 else "one seed")
    mean, (stderr, freedom) = float(gaps.mean(axis=0).sum() / weights.sum()), error
    if not freedom:
        return Difference(mean, nan, nan, "one seed")
    random = np.random.default_rng(0)
    samples = mean + row_errors(gaps, weights, random) + stderr * random.permutation(students_t(freedom, RESAMPLES))
    low, high = map(float, np.percentile(samples, [50 * level, 100 - 50 * level]))
    verdict: Verdict = "same" if low <= 0 <= high else "better" if sign * low > 0 else "worse"
    beyond = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(samples) + 1))
    return Difference(mean, low, high, "one seed" if len(gaps) < 2 else verdict, p, error=error)


def row_errors(gaps: Floats, weights: Floats, random: np.random.Generator) -> Floats:
    """Errors of Σ gaps / Σ weights by the choice of rows, (RESAMPLES,). What a row does in one seed and not in another
    is part of how seeds differ, and is taken out here."""
    (seeds, rows), total, of_row = gaps.shape, weights.sum(), gaps.mean(axis=0)
    means = []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = random.integers(0, rows, (AT_ONCE, rows))
        means.append(of_row[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    resampled = np.concatenate(means)
    of_one_seed = gaps - weights * (gaps.sum(axis=1, keepdims=True) / total)
    counted = of_one_seed.var(axis=0, ddof=1).sum() / seeds / total**2 if seeds > 1 else 0.0
    left = math.sqrt(max(0.0, 1 - counted / max(resampled.var(), 1e-300)))
    return np.asarray(left * (resampled - resampled.mean()))


def half_width(error: SeedError, level: float) -> float:
    """Of the interval that seeds alone give."""
    stderr, freedom = error
    return stderr * float(np.quantile(students_t(freedom, RESAMPLES), 1 - level / 2)) if freedom else 0.0


@cache
def students_t(freedom: float, number: int) -> Floats:
    """So many values of Student's t, evenly from its lowest to its highest."""
    return np.asarray(np.sort(np.random.default_rng(0).standard_t(freedom, 101 * number))[50::101])


@cache
def _f_point(over: float, under: float, number: int) -> float:
    """F's 90 % point."""
    return float(np.quantile(np.random.default_rng(0).f(over, under, 101 * number), 0.9))


def corrected(differences: Sequence[Difference], level: float = SIGNIFICANT) -> list[Difference]:
    """The differences with Holm's p-values for all of them together, and the verdicts by these: those below ``level``
    are false in at most such a share of studies with so many comparisons. Those without a verdict by their interval
    stay as they are."""
    known = sorted(
        (each.p, place) for place, each in enumerate(differences) if each.verdict != "one seed" and each.p is not None
    )
    changed, least = list(differences), 0.0
    for rank, (p, place) in enumerate(known):
        each = differences[place]
        least = max(least, min(1.0, p * (len(known) - rank)))
        lost = each.verdict in ("better", "worse") and least >= level
        changed[place] = replace(each, holm_p=least, holm_verdict="same" if lost else each.verdict)
    return changed
