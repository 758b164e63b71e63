"""The search for a learning rate on a grid of half decades, and of quarter decades beside the best.

It goes downhill until the best half decade has neighbors on both sides. An index counts quarter decades; the even ones
are half decades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal


def rate(index: int) -> float:
    """1, 2, 3, 6, 10, …: the grid's value at ``index``, 10^(index / 4) to one digit."""
    return float(f"{10 ** (index / 4):.0e}")


def nearest_index(learning_rate: float) -> int:
    """Where on the grid a learning rate lies."""
    return round(4 * math.log10(learning_rate))


def first_index(learning_rate: float) -> int:
    """The half decade at which a search from this learning rate starts."""
    return 2 * round(2 * math.log10(learning_rate))


def sweep_indices(lowest: float, highest: float, per_decade: Literal[2, 4] = 4) -> range:
    """Every quarter or half decade from ``lowest`` to ``highest``."""
    if per_decade == 2:
        return range(first_index(lowest), first_index(highest) + 1, 2)
    return range(nearest_index(lowest), nearest_index(highest) + 1)


def next_indices(start: int, losses: Mapping[int, float | None], max_runs: int, refine: bool = False) -> list[int]:
    """The grid indices that the search needs next, whatever is found at any of them; none when it is over.

    ``losses`` by index; None is a run that diverged. First come the start and its neighbors, then whatever lies
    beyond the best, until that is interior or ``max_runs`` are spent; with ``refine`` two more, on both sides of it.
    """
    halves = {index: loss for index, loss in losses.items() if index % 2 == 0}
    around = [index for index in (start, start - 2, start + 2) if index not in halves]
    if around:
        return around
    best = best_index(halves)
    beyond = [index for index in (best - 2, best + 2) if index not in halves]
    if beyond and len(halves) < max_runs:
        return beyond
    return [index for index in (best - 1, best + 1) if refine and index not in losses]


def best_index(losses: Mapping[int, float | None]) -> int:
    """The index of the lowest loss; a diverged run is never the best, the lower of two equals is."""
    return min(losses, key=lambda index: (losses[index] is None, losses[index] or 0.0, index))


def is_interior(losses: Mapping[int, float | None]) -> bool:
    """Whether something was tried on both sides of the best."""
    return min(losses) < best_index(losses) < max(losses)
