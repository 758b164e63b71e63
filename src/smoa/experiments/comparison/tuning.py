"""The search for a learning rate: half decades, walking downhill until the best has neighbours on both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping


def half_decade(index: int) -> float:
    """1, 3, 10, 30, …: the grid's value at ``index``, 10^(index / 2) to one digit."""
    return float(f"{10 ** (index / 2):.0e}")


def nearest_index(learning_rate: float) -> int:
    """Where on the grid a learning rate lies."""
    return round(2 * math.log10(learning_rate))


def next_index(start: int, losses: Mapping[int, float | None], max_runs: int) -> int | None:
    """The grid index to try next; None when the best is interior or ``max_runs`` are spent.

    ``losses`` by index; None is a run that diverged. First come the start and its neighbours, then whatever lies
    beyond the best.
    """
    for index in (start, start - 1, start + 1):
        if index not in losses:
            return index
    if len(losses) >= max_runs:
        return None
    best = best_index(losses)
    beyond = [index for index in (best - 1, best + 1) if index not in losses]
    return beyond[0] if beyond else None


def best_index(losses: Mapping[int, float | None]) -> int:
    """The index of the lowest loss; a diverged run is never the best, the lower of two equals is."""
    return min(losses, key=lambda index: (losses[index] is None, losses[index] or 0.0, index))


def is_interior(losses: Mapping[int, float | None]) -> bool:
    """Whether the best has a tried neighbour on both sides."""
    best = best_index(losses)
    return best - 1 in losses and best + 1 in losses
