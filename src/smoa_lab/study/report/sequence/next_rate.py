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
    own next rate."""

    best: float
    rate: float
    learned_loss: float
    kept_loss: float
    cost: float


def at_next_rate(own: Curve, reference: Curve) -> NextRate | None:
    """An entry, or the reference itself, one rate too high; None where no higher rate than its best was run."""
    index, learned, kept = _next(own), own.learned.mean(), own.kept.mean()
    if index is None:
        return None
    found = NextRate(
        entry=own.entry,
        reference=reference.entry,
        best=own.rates[index - 1],
        rate=own.rates[index],
        learned_loss=float(learned[index]),
        kept_loss=float(kept[index]),
        cost=float(kept[index] - kept[index - 1]),
    )
    at, both = _next(reference), None if own is reference else paired(own, reference)
    if at is None or both is None:
        return found
    gaps = both[0].kept.nll[index] - both[1].kept.nll[at]
    return replace(found, difference=paired_difference(gaps, own.kept.tokens, sign=-1))


def _next(own: Curve) -> int | None:
    """The place of the rate after the best one."""
    index = own.best + 1
    return index if index < len(own.rates) else None
