"""What the entries of a sequence kept, of the first task or elsewhere, along the learning rate and at equal learning.

Both losses of an entry are interpolated linearly along the logarithm of its learning rate. The level is the lowest loss
of the second task that both the entry and its reference reach at a rate: the higher one of their lowest losses. Both
are read at their lowest rate at which the second loss comes down to it, by the seeds that both have. Questions of both
tasks are resampled, the same for both entries, and level and rates determined anew each time. Over seeds the error is
Student's t, of the differences of single seeds, each with a level and rates of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smoa_lab.study.statistics import (
    RESAMPLES,
    Difference,
    Floats,
    difference,
    paired_difference,
    seed_errors,
)
from smoa_lab.study.trials import Result

Kept = Literal["first", "elsewhere"]
"""What is to be kept: the first task, or the text elsewhere."""


@dataclass(frozen=True)
class CurveLosses:
    """The losses on one task or text, (rates, seeds, questions), and the tokens of each question, (questions,)."""

    nll: Floats
    tokens: Floats

    def mean(self) -> Floats:
        """Nats per token at each rate, (rates,)."""
        return np.asarray(self.nll.mean(axis=1).sum(axis=-1) / self.tokens.sum())

    def resampled(self, counts: NDArray[np.int64]) -> Floats:
        """The means, (resamples, rates), with each question counted as often as ``counts`` (resamples, questions)."""
        return np.asarray((counts @ self.nll.mean(axis=1).T) / (counts @ self.tokens)[:, None])


@dataclass(frozen=True)
class Curve:
    """An entry along its rates, ascending, at those of them where every seed has a run that did not diverge."""

    entry: str
    rates: list[float]
    seeds: list[int]
    kept: CurveLosses
    learned: CurveLosses
    diverged: list[float] = field(default_factory=list)
    """Rates at which a run did."""

    @property
    def best(self) -> int:
        """The place of the rate at which the most was learned."""
        return int(np.argmin(self.learned.mean()))

    @property
    def next_rate(self) -> float | None:
        """The rate after the best one, of all that were run."""
        return min((rate for rate in (*self.rates, *self.diverged) if rate > self.rates[self.best]), default=None)

    def only(self, seeds: list[int]) -> Curve:
        """The curve of these seeds alone."""
        chosen = [self.seeds.index(seed) for seed in seeds]
        kept, learned = (CurveLosses(part.nll[:, chosen], part.tokens) for part in (self.kept, self.learned))
        return replace(self, seeds=seeds, kept=kept, learned=learned)


def curve_of(entry: str, runs: Sequence[Result], kept: Kept = "first") -> Curve | None:
    """The curve of an entry by the seeds that all its rates have; None without one run that did not diverge."""
    by_rate: dict[float, dict[int, Result]] = defaultdict(dict)
    for run in runs:
        if kept == "first" or "texts" in run:
            training = run["config"]["training"]
            by_rate[training["learning_rate"]][training["seed"]] = run
    seeds = sorted(set.intersection(*map(set, by_rate.values()))) if by_rate else []

    def is_finite(run: Result) -> bool:
        return None not in (*run["questions"]["nll"], *_kept(run, kept)["nll"])

    rates = sorted(rate for rate, of_rate in by_rate.items() if all(is_finite(of_rate[seed]) for seed in seeds))
    if not rates or not seeds:
        return None
    chosen = [[by_rate[rate][seed] for seed in seeds] for rate in rates]
    of_kept = _losses([[_kept(run, kept) for run in of_rate] for of_rate in chosen])
    learned = _losses([[run["questions"] for run in of_rate] for of_rate in chosen])
    return Curve(entry, rates, seeds, of_kept, learned, diverged=sorted(by_rate.keys() - rates))


def _kept(run: Result, kept: Kept) -> dict[str, Any]:
    """The losses on what is to be kept."""
    losses: dict[str, Any] = run["first"]["questions"] if kept == "first" else run["texts"]
    return losses


def _losses(questions: list[list[dict[str, Any]]]) -> CurveLosses:
    nll = [[of_seed["nll"] for of_seed in seeds] for seeds in questions]
    return CurveLosses(np.array(nll, dtype=np.float64), np.array(questions[0][0]["tokens"], dtype=np.float64))


def paired(own: Curve, other: Curve) -> tuple[Curve, Curve] | None:
    """Two entries' curves by the seeds that they share; None for an entry with itself, and without any seed."""
    seeds = [seed for seed in own.seeds if seed in other.seeds]
    return (own.only(seeds), other.only(seeds)) if seeds and own is not other else None


@dataclass(frozen=True)
class Compared:
    """An entry and its reference. ``difference`` is None for the reference, and where nothing can be compared."""

    entry: str
    reference: str
    difference: Difference | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Reading:
    """What a curve shows at a level. ``is_lowest``: its lowest rate learns more than that already, and is taken."""

    rate: float
    kept_loss: float
    is_lowest: bool


@dataclass(frozen=True)
class EqualLearning(Compared):
    """An entry and its reference at the ``level`` that both reach; the reference itself at its best."""

    level: float
    own: Reading
    other: Reading

    @property
    def gap(self) -> float:
        """How much more of the loss on what is to be kept the entry has."""
        return self.own.kept_loss - self.other.kept_loss


@dataclass(frozen=True)
class Crossing:
    """A place on a curve: ``share`` of the way from the rate at ``index`` to the next one."""

    index: int
    share: float

    def of(self, values: Sequence[float] | Floats) -> float:
        """The value there of something that is known at the rates."""
        here = float(values[self.index])
        return here if not self.share else here + self.share * (float(values[self.index + 1]) - here)


def crossing(losses: Sequence[float] | Floats, level: float) -> Crossing | None:
    """Where losses along ascending rates first come down to the level; None where they never do."""
    if losses[0] <= level:
        return Crossing(0, 0.0)
    for index in range(len(losses) - 1):
        before, after = float(losses[index]), float(losses[index + 1])
        if before > level >= after:
            return Crossing(index, (before - level) / (before - after))
    return None


def at_equal_learning(own: Curve, reference: Curve, at: int | None = None) -> EqualLearning:
    """What an entry, or the reference itself, and the reference kept where they learned as much: as the reference at
    its best rate, or at the one with the index ``at``, unless the entry at its best learned less."""
    both = paired(own, reference)
    own, reference = both or (own, reference)
    at = reference.best if at is None else at
    compared = _compared(own, reference, at)
    if both is None:
        return compared
    by_seed = [_compared(own.only([seed]), reference.only([seed]), at).gap for seed in own.seeds]
    random = np.random.default_rng(0)
    gaps = _resampled_gaps(own, reference, at, random)
    samples = gaps + random.choice(seed_errors(np.array(by_seed), random), len(gaps), replace=False)
    return replace(compared, difference=difference(compared.gap, samples, -1, len(by_seed)))


def at_lower_levels(own: Curve, reference: Curve) -> list[EqualLearning]:
    """The same at each rate of the reference below its best, where it learned less than both at their best."""
    if own is reference:
        return []
    own, reference = paired(own, reference) or (own, reference)
    losses = reference.learned.mean()
    lowest = max(losses[reference.best], own.learned.mean().min())
    return [at_equal_learning(own, reference, at) for at in range(reference.best) if losses[at] > lowest]


def least_gaps(curves: Sequence[Curve]) -> dict[str, float]:
    """How far each entry's first-task loss is above the lowest one, at the level where that is least.

    Levels are the second losses of all rates of all entries that at least half of the entries reach.
    """
    gaps: dict[str, float] = {}
    for level in sorted({float(loss) for curve in curves for loss in curve.learned.mean()}):
        places = [(curve, crossing(curve.learned.mean(), level)) for curve in curves]
        kept = {curve.entry: place.of(curve.kept.mean()) for curve, place in places if place is not None}
        if 2 * len(kept) >= len(curves):
            lowest = min(kept.values())
            gaps |= {name: min(loss - lowest, gaps.get(name, math.inf)) for name, loss in kept.items()}
    return gaps


def _compared(own: Curve, reference: Curve, at: int) -> EqualLearning:
    """Both at the level of the higher one of the entry's lowest loss and the reference's at the rate ``at``."""
    level = max(float(own.learned.mean().min()), float(reference.learned.mean()[at]))
    readings = []
    for curve in (own, reference):
        losses = curve.learned.mean()
        place = crossing(losses, level)
        assert place is not None
        rate = math.exp(place.of(np.log(curve.rates)))
        readings.append(Reading(rate, place.of(curve.kept.mean()), is_lowest=bool(losses[0] < level)))
    return EqualLearning(own.entry, reference.entry, level, *readings)


def _resampled_gaps(own: Curve, reference: Curve, at: int, random: np.random.Generator) -> Floats:
    """The loss on what is to be kept minus the reference's, (RESAMPLES,), at the level of the higher one of the
    entry's loss at its best rate and the reference's at ``at``."""

    def counts(tokens: Floats) -> NDArray[np.int64]:
        """How often each question is drawn, (RESAMPLES, questions)."""
        questions = len(tokens)
        return random.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)

    of_kept, of_learned = counts(own.kept.tokens), counts(own.learned.tokens)
    kept = [curve.kept.resampled(of_kept) for curve in (own, reference)]
    learned = [curve.learned.resampled(of_learned) for curve in (own, reference)]
    levels = np.maximum(learned[0][:, own.best], learned[1][:, at])
    sides = []
    for side in (0, 1):
        samples = zip(learned[side], levels, kept[side], strict=True)
        places = [(crossing(losses, level), of_sample) for losses, level, of_sample in samples]
        sides.append(np.array([place.of(of_sample) for place, of_sample in places if place is not None]))
    return np.asarray(sides[0] - sides[1])


@dataclass(frozen=True)
class NextRate(Compared):
    """What a rate that is one step of the sweep too high costs: an entry at ``rate``, the one after its ``best``, by
    the second task's loss. ``cost`` is the rise of the loss on what is to be kept from the one to the other,
    ``difference`` that loss at ``rate`` minus the reference's at its own next rate. The losses are None where a run
    diverged at ``rate``."""

    best: float
    rate: float
    learned_loss: float | None = None
    kept_loss: float | None = None
    cost: float | None = None


def at_next_rate(own: Curve, reference: Curve) -> NextRate | None:
    """An entry, or the reference itself, one rate too high; None where no higher rate than its best was run."""
    rate = own.next_rate
    if rate is None:
        return None
    compared = NextRate(own.entry, reference.entry, best=own.rates[own.best], rate=rate)
    if rate in own.diverged:
        return compared
    index, learned, kept = own.rates.index(rate), own.learned.mean(), own.kept.mean()
    cost = float(kept[index] - kept[own.best])
    compared = replace(compared, learned_loss=float(learned[index]), kept_loss=float(kept[index]), cost=cost)
    theirs, both = reference.next_rate, paired(own, reference)
    if theirs not in reference.rates or both is None:
        return compared
    gaps = both[0].kept.nll[index] - both[1].kept.nll[reference.rates.index(theirs)]
    return replace(compared, difference=paired_difference(gaps, own.kept.tokens, sign=-1))
