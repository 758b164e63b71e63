"""What each entry kept, of the first task or elsewhere, at equal learning of the second task.

Both losses of an entry are interpolated linearly along the logarithm of its learning rate. The level is the second
task's loss that the reference reaches at its own best rate. An entry is read at the lowest rate at which its second
loss comes down to the level. Questions of both tasks are resampled, the same for both entries, and level and rate found
anew each time; over seeds the error is Student's t, at the rate of the whole sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from smoa_lab.study.report.results.statistics import (
    RESAMPLES,
    difference,
    seed_errors,
)
from smoa_lab.study.report.sequence.compared import Compared
from smoa_lab.study.report.sequence.curves import Curve, paired


@dataclass(frozen=True)
class EqualLearning(Compared):
    """An entry at the ``level`` of its reference. ``rate`` and ``kept_loss`` are None if it never reaches it.

    ``is_lowest``: its lowest rate learns more than the level already, and is taken. ``reached`` is the share of
    resamples in which the level is reached; the others are left out.
    """

    level: float
    rate: float | None = None
    kept_loss: float | None = None
    is_lowest: bool = False
    reached: float = 0.0


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


def at_equal_learning(own: Curve, reference: Curve) -> EqualLearning:
    """What an entry, or the reference itself, kept where it learned as much as the reference at its best."""
    best = reference.best
    level = float(reference.learned.mean()[best])
    losses = own.learned.mean()
    place = Place(best, 0.0) if own is reference else crossing(losses, level)
    nothing = EqualLearning(own.entry, reference.entry, level)
    if place is None:
        return nothing
    found = replace(
        nothing,
        rate=math.exp(place.of(np.log(own.rates))),
        kept_loss=place.of(own.kept.mean()),
        is_lowest=own is not reference and bool(losses[0] < level),
        reached=1.0,
    )
    return found if own is reference else _compared(found, own, reference, place, best)


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


def _compared(found: EqualLearning, own: Curve, reference: Curve, place: Place, best: int) -> EqualLearning:
    both = paired(own, reference)
    if both is None:
        return found
    own, reference = both
    random = np.random.default_rng(0)
    gaps = _resampled_gaps(own, reference, best, random)
    reached = gaps[np.isfinite(gaps)]
    if not len(reached):
        return replace(found, reached=0.0)
    by_seed = _at(own, place) - _at(reference, Place(best, 0.0))
    samples = reached + random.choice(seed_errors(by_seed, random), len(reached), replace=False)
    compared = difference(float(by_seed.mean()), samples, -1, len(own.seeds))
    return replace(found, reached=len(reached) / RESAMPLES, difference=compared)


def _resampled_gaps(own: Curve, reference: Curve, best: int, random: np.random.Generator) -> NDArray[np.float64]:
    """The loss on what is to be kept minus the reference's, (RESAMPLES,); NaN where the level is not reached."""
    counts = [_counts(task.tokens, random) for task in (own.kept, own.learned)]
    losses, learned = own.kept.resampled(counts[0]), own.learned.resampled(counts[1])
    level = reference.learned.resampled(counts[1])[:, best]
    places = (crossing(one, wanted) for one, wanted in zip(learned, level, strict=True))
    kept = [math.nan if place is None else place.of(one) for place, one in zip(places, losses, strict=True)]
    return np.array(kept) - reference.kept.resampled(counts[0])[:, best]


def _counts(tokens: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """How often each question is drawn, (RESAMPLES, questions)."""
    questions = len(tokens)
    return random.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)


def _at(own: Curve, place: Place) -> NDArray[np.float64]:
    """The loss on what is to be kept at a place, (seeds,)."""
    by_seed = own.kept.nll.sum(axis=-1) / own.kept.tokens.sum()
    return np.array([place.of(losses) for losses in by_seed.T])
