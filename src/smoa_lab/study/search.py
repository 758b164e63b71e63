"""The search for a learning rate.

It goes downhill on a grid of half decades until the best has neighbors on both sides; with ``refine`` it also tries the
quarter decades beside the best. An index counts quarter decades; the even ones are half decades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


def rate(index: int) -> float:
    """1, 2, 3, 6, 10, …: the grid's value at ``index``, 10^(index / 4) to one digit."""
    return float(f"{10 ** (index / 4):.0e}")


def nearest_index(learning_rate: float) -> int:
    """Where on the grid a learning rate lies."""
    return round(4 * math.log10(learning_rate))


def first_index(learning_rate: float) -> int:
    """The half decade at which a search from this learning rate starts."""
    return 2 * round(2 * math.log10(learning_rate))


def next_indices(start: int, losses: Mapping[int, float | None], max_runs: int, refine: bool = False) -> list[int]:
    """The grid indices that the search needs next, whatever comes out at any of them; none when it is over.

    ``losses`` by index; None is a run that diverged. First come the start and its neighbors, then whatever lies
    beyond the best, until that is interior, with ``refine`` then two more, on both sides of it; or until ``max_runs``
    are spent.
    """
    halves = {index: loss for index, loss in losses.items() if index % 2 == 0}
    around = [index for index in (start, start - 2, start + 2) if index not in halves]
    if around:
        return around
    best = best_index(halves)
    beyond = [index for index in (best - 2, best + 2) if index not in halves]
    beside = [index for index in (best - 1, best + 1) if refine and index not in losses]
    return (beyond or beside)[: max(0, max_runs - len(losses))]


def best_index(losses: Mapping[int, float | None]) -> int:
    """The index of the lowest loss; a diverged run is never the best, the lower of two equals is."""
    return min(losses, key=lambda index: (losses[index] is None, losses[index] or 0.0, index))


@dataclass(frozen=True)
class Tuned:
    """An entry's search: losses by learning rate, the chosen one, and whether something was tried on both sides of
    it."""

    losses: dict[float, float | None]
    learning_rate: float
    interior: bool

    @classmethod
    def of(cls, losses: Mapping[int, float | None]) -> Tuned:
        """What a search over these grid indices chooses."""
        best = best_index(losses)
        by_rate = {rate(index): losses[index] for index in sorted(losses)}
        return cls(by_rate, rate(best), min(losses) < best < max(losses))
