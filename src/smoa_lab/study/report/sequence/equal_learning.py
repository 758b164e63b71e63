"""What each entry kept, of the first task or elsewhere, at equal learning of the second task.

Both losses of an entry are interpolated linearly along the logarithm of its learning rate. The level is the lowest loss
of the second task that both the entry and its reference reach at a rate: the higher one of their lowest losses. Both
are read at their lowest rate at which the second loss comes down to it, by the seeds that both have. Questions of both
tasks are resampled, the same for both entries, and level and rates found anew each time. Over seeds the error is
Student's t, of the differences of single seeds, each with a level and rates of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from smoa_lab.study.report.results.statistics import RESAMPLES, difference, seed_errors
from smoa_lab.study.report.sequence.compared import Compared
from smoa_lab.study.report.sequence.curves import Curve, paired


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
class Place:
    """A place on a curve: ``share`` of the way from the rate at ``index`` to the next one."""

    index: int
    share: float

    def of(self, values: Sequence[float] | NDArray[np.float64]) -> float:
        """The value there of one that is known at the rates."""
        here = float(values[self.index])
        return here if not self.share else here + self.share * (float(values[self.index + 1]) - here)


def crossing(losses: Sequence[float] | NDArray[np.float64], level: float) -> Place | None:
    """Where losses along ascending rates first come down to the level; None where they never do."""
    if losses[0] <= level:
        return Place(0, 0.0)
    for index in range(len(losses) - 1):
        before, after = float(losses[index]), float(losses[index + 1])
        if before > level >= after:
            return Place(index, (before - level) / (before - after))
    return None


def at_equal_learning(own: Curve, reference: Curve, at: int | None = None) -> EqualLearning:
    """What an entry, or the reference itself, and the reference kept where they learned as much: as the reference at
    its best rate, or at the one with the index ``at``, unless the entry at its best learned less."""
    both = None if own is reference else paired(own, reference)
    own, reference = both or (own, reference)
    at = reference.best if at is None else at
    found = _compared(own, reference, at)
    if both is None:
        return found
    by_seed = [_compared(own.only([seed]), reference.only([seed]), at).gap for seed in own.seeds]
    random = np.random.default_rng(0)
    gaps = _resampled_gaps((own, reference), (own.best, at), random)
    samples = gaps + random.choice(seed_errors(np.array(by_seed), random), len(gaps), replace=False)
    return replace(found, difference=difference(found.gap, samples, -1, len(by_seed)))


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
    for level in sorted({float(loss) for own in curves for loss in own.learned.mean()}):
        places = {own.entry: (own, crossing(own.learned.mean(), level)) for own in curves}
        kept = {name: place.of(own.kept.mean()) for name, (own, place) in places.items() if place is not None}
        if 2 * len(kept) >= len(curves):
            lowest = min(kept.values())
            gaps |= {name: min(loss - lowest, gaps.get(name, math.inf)) for name, loss in kept.items()}
    return gaps


def _compared(own: Curve, reference: Curve, at: int) -> EqualLearning:
    """Both at the level of the higher one of the entry's lowest loss and the reference's at the rate ``at``."""
    level = max(float(own.learned.mean().min()), float(reference.learned.mean()[at]))
    readings = (_reading(one, level) for one in (own, reference))
    return EqualLearning(own.entry, reference.entry, level, *readings)


def _place(losses: Sequence[float] | NDArray[np.float64], level: float) -> Place:
    """The crossing of a level that is reached."""
    place = crossing(losses, level)
    assert place is not None
    return place


def _reading(of: Curve, level: float) -> Reading:
    place = _place(of.learned.mean(), level)
    is_lowest = bool(of.learned.mean()[0] < level)
    return Reading(math.exp(place.of(np.log(of.rates))), place.of(of.kept.mean()), is_lowest)


def _resampled_gaps(
    curves: tuple[Curve, Curve], ats: tuple[int, int], random: np.random.Generator
) -> NDArray[np.float64]:
    """The loss on what is to be kept minus the reference's, (RESAMPLES,), at the level of the higher of their losses at
    the rates with the indices ``ats``."""
    of_kept, of_learned = (_counts(task.tokens, random) for task in (curves[0].kept, curves[0].learned))
    kept, learned = zip(
        *((one.kept.resampled(of_kept), one.learned.resampled(of_learned)) for one in curves), strict=True
    )
    levels = np.maximum(*(losses[:, place] for losses, place in zip(learned, ats, strict=True)))
    own, other = (_at_levels(levels, *losses) for losses in zip(learned, kept, strict=True))
    return own - other


def _at_levels(
    levels: NDArray[np.float64], learned: NDArray[np.float64], kept: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The loss on what is to be kept at these levels, (RESAMPLES,), of losses (RESAMPLES, rates)."""
    found = [_place(*pair).of(losses) for *pair, losses in zip(learned, levels, kept, strict=True)]
    return np.array(found)


def _counts(tokens: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """How often each question is drawn, (RESAMPLES, questions)."""
    questions = len(tokens)
    return random.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)
