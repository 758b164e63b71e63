"""What a learning rate that is one step of the sweep too high costs: each entry at the rate after its own best."""

from __future__ import annotations

from dataclasses import dataclass, replace

from smoa_lab.study.report.results.statistics import paired_difference
from smoa_lab.study.report.sequence.compared import Compared
from smoa_lab.study.report.sequence.curves import Curve, paired


@dataclass(frozen=True)
class NextRate(Compared):
    """An entry at ``rate``, the one after its ``best``, by the second task's loss. ``cost`` is the rise of the loss on
    what is to be kept from the one to the other, ``difference`` that loss at ``rate`` minus the reference's at its
    own next rate. The losses are None where a run diverged at ``rate``."""

    best: float
    rate: float
    learned_loss: float | None = None
    kept_loss: float | None = None
    cost: float | None = None


def at_next_rate(own: Curve, reference: Curve) -> NextRate | None:
    """An entry, or the reference itself, one rate too high; None where no higher rate than its best was run."""
    rate = _next(own)
    if rate is None:
        return None
    found = NextRate(own.entry, reference.entry, best=own.rates[own.best], rate=rate)
    if rate in own.diverged:
        return found
    index, learned, kept = own.rates.index(rate), own.learned.mean(), own.kept.mean()
    cost = float(kept[index] - kept[own.best])
    found = replace(found, learned_loss=float(learned[index]), kept_loss=float(kept[index]), cost=cost)
    theirs, both = _next(reference), None if own is reference else paired(own, reference)
    if theirs not in reference.rates or both is None:
        return found
    gaps = both[0].kept.nll[index] - both[1].kept.nll[reference.rates.index(theirs)]
    return replace(found, difference=paired_difference(gaps, own.kept.tokens, sign=-1))


def _next(own: Curve) -> float | None:
    """The rate after the best one, of all that were run."""
    return min((rate for rate in (*own.rates, *own.diverged) if rate > own.rates[own.best]), default=None)
