"""Differences between two entries, paired by seed and by question, with 95 % intervals.

Questions are resampled (bootstrap). Seeds are too few for that: three of them, resampled, span no more than their own
smallest and largest, which leave a true difference of 0 out one time in four. So the mean over seeds is given an error
of Student's t with seeds - 1 degrees of freedom, in units of its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smoa.errors import DataError

Floats = NDArray[np.float64]
Verdict = Literal["better", "same", "worse", "one seed"]
RESAMPLES = 4000
AT_ONCE = 100
"""Resamples that are drawn together."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Outcomes:
    """Per seed and question, (seeds, questions) float64: ``loss`` is the gold answer's negative log-likelihood; per
    question (questions,): its ``tokens``, and its ``share`` in an accuracy that counts every task alike."""

    loss: Floats
    right: Floats
    tokens: Floats
    share: Floats

    def mean_loss(self) -> Floats:
        """Per seed, nats per answer token."""
        return np.asarray(self.loss.sum(axis=1) / self.tokens.sum())

    def accuracy(self) -> Floats:
        """Per seed, the mean over tasks of the share of right answers."""
        return np.asarray(self.right @ self.share / self.share.sum())


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and questions with its 95 % interval."""

    mean: float
    low: float
    high: float

    def signed(self, scale: float, digits: int) -> str:
        """``mean [low, high]`` as text, with their signs; of a run that diverged there are none."""
        if not math.isfinite(self.mean):
            return "diverged"
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Difference(Interval):
    """An entry's value minus the reference's. One seed says nothing of how seeds differ, so it gets no verdict.

    ``p`` is two-sided and never below 2 / (resamples + 1), ``holm_p`` corrected for all comparisons of a table that get
    a verdict by their interval, and ``holm_verdict`` the verdict by it. A run that diverged has no p-value, and its
    verdict stands.
    """

    verdict: Verdict
    p: float | None = None
    holm_p: float | None = None
    holm_verdict: Verdict | None = None

    @property
    def label(self) -> str:
        """The verdict as text, with the corrected one where the two differ."""
        changed = self.holm_verdict not in (None, self.verdict)
        return f"{self.verdict} (Holm: {self.holm_verdict})" if changed else self.verdict


def outcomes(results: Sequence[dict[str, Any]]) -> Outcomes:
    """The outcomes in the JSON of an entry's final runs, one per seed. A question that diverged counts as infinitely
    bad."""
    questions = [result["questions"] for result in results]
    tasks = questions[0]["task"]
    loss = [[np.inf if nll is None else nll for nll in of_seed["nll"]] for of_seed in questions]
    return Outcomes(
        loss=np.array(loss, dtype=np.float64),
        right=np.array([of_seed["right"] for of_seed in questions], dtype=np.float64),
        tokens=np.array(questions[0]["tokens"], dtype=np.float64),
        share=np.array([1 / tasks.count(task) for task in tasks]),
    )


def check_paired(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise DataError unless both runs were asked the same questions in the same tokens."""
    asked = [(of.get("sha256"), of["questions"]["tokens"]) for of in (run, other)]
    if asked[0] != asked[1]:
        raise DataError(
            f"{run.get('name')} and {other.get('name')} were scored on different questions or by different "
            "tokenizers, so they can't be compared; move the older one away and run smoa compare again"
        )


def accuracy_interval(entry: Outcomes) -> Interval:
    """The accuracy itself with its interval."""
    values = entry.right * entry.share
    mean = float(values.mean(axis=0).sum() / entry.share.sum())
    return Interval(mean, *_bounds(_resampled(values, entry.share)))


def loss_difference(entry: Outcomes, reference: Outcomes) -> Difference:
    """The difference in loss per answer token; lower is better. Where one of the two diverged the other is better."""
    diverged = not np.isfinite(entry.loss).all(), not np.isfinite(reference.loss).all()
    if any(diverged):
        nan = float("nan")
        return Difference(nan, nan, nan, "same" if all(diverged) else "worse" if diverged[0] else "better")
    return paired_difference(entry.loss - reference.loss, entry.tokens, sign=-1)


def accuracy_difference(entry: Outcomes, reference: Outcomes) -> Difference:
    """The difference in accuracy; higher is better."""
    return paired_difference((entry.right - reference.right) * entry.share, entry.share, sign=1)


def paired_difference(gaps: Floats, weights: Floats, sign: int) -> Difference:
    """The difference Σ gaps / Σ weights over seeds and questions, (seeds, questions) and (questions,); ``sign`` as in
    :func:`difference`."""
    mean = float(gaps.mean(axis=0).sum() / weights.sum())
    return difference(mean, _resampled(gaps, weights), sign, len(gaps))


def difference(mean: float, samples: Floats, sign: int, seeds: int) -> Difference:
    """A difference with the interval and verdict of its resamples; ``sign`` is 1 where higher is better, else -1."""
    low, high = _bounds(samples)
    verdict: Verdict = "same" if low <= 0 <= high else "better" if sign * low > 0 else "worse"
    beyond = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(samples) + 1))
    return Difference(mean, low, high, "one seed" if seeds < 2 else verdict, p)


def _bounds(samples: Floats) -> tuple[float, float]:
    low, high = map(float, np.percentile(samples, [2.5, 97.5]))
    return low, high


def _resampled(values: Floats, weights: Floats) -> Floats:
    """Resamples of Σ values / Σ weights, (RESAMPLES,)."""
    questions = values.shape[1]
    of_question = values.mean(axis=0)
    random = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = random.integers(0, questions, (AT_ONCE, questions))
        means.append(of_question[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return np.asarray(np.concatenate(means) + seed_errors(values.sum(axis=1) / weights.sum(), random))


def seed_errors(of_seed: Floats, random: np.random.Generator) -> Floats:
    """Errors of the mean over seeds, (RESAMPLES,), in random order; 0 for one seed, which shows none."""
    seeds = len(of_seed)
    if seeds < 2:
        return np.zeros(RESAMPLES)
    many = np.sort(random.standard_t(seeds - 1, 101 * RESAMPLES))
    return np.asarray(random.permutation(many[50::101]) * of_seed.std(ddof=1) / seeds**0.5)


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """The differences with Holm's p-values for all of them together, and the verdicts by these: those below 5 % are
    false in at most 5 % of studies with so many comparisons. Those without a verdict by their interval stay as they
    are."""
    known = sorted(
        (each.p, place)
        for place, each in enumerate(differences)
        if each is not None and each.verdict != "one seed" and each.p is not None
    )
    changed, least = list(differences), 0.0
    for rank, (p, place) in enumerate(known):
        each = differences[place]
        assert each is not None
        least = max(least, min(1.0, p * (len(known) - rank)))
        lost = each.verdict in ("better", "worse") and least >= SIGNIFICANT
        changed[place] = replace(each, holm_p=least, holm_verdict="same" if lost else each.verdict)
    return changed
