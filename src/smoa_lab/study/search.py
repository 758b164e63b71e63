"""The search for a learning rate.

It goes downhill in half decades from the rate that an entry names, until the best has neighbors on both sides, and then
tries the quarter decades beside the best. An index counts quarter decades from the named rate; the even ones are half
decades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeVar

Key = TypeVar("Key")


def rate(start: float, index: int) -> float:
    """start · 10^(index / 4) to two digits; the start itself is taken as it is."""
    return float(f"{start * 10 ** (index / 4):.1e}") if index else start


def index_of(start: float, learning_rate: float) -> int:
    """Where a rate of the search lies."""
    return round(4 * math.log10(learning_rate / start))


def rate_text(learning_rate: float) -> str:
    """``2e-3``: a rate in names of folders and in tables, with all its digits."""
    return f"{Decimal(repr(learning_rate)).normalize():e}".replace("e+", "e")


def next_indices(losses: Mapping[int, float | None], max_runs: int) -> list[int]:
    """The indices that the search needs next, whatever comes out at any of them; none when it is over, or ``max_runs``
    are spent. ``losses`` by index; None is a run that diverged."""
    halves = {index: loss for index, loss in losses.items() if index % 2 == 0}
    around = [index for index in (0, -2, 2) if index not in halves]
    if around:
        return around[: max(0, max_runs - len(losses))]
    best = best_of(halves)
    beyond = [index for index in (best - 2, best + 2) if index not in halves]
    beside = [index for index in (best - 1, best + 1) if index not in losses]
    return (beyond or beside)[: max(0, max_runs - len(losses))]


def best_of(losses: Mapping[Key, float | None]) -> Key:
    """Where the loss is lowest; a diverged run is never the best, the lower of two equals is."""
    ordered: Any = losses
    best: Key = min(ordered, key=lambda key: (losses[key] is None, losses[key] or 0.0, key))
    return best


@dataclass(frozen=True)
class Chosen:
    """The rate that an entry's final runs take, the losses of its search by rate, and where among them it lies:
    ``named`` is a rate that was taken without a search."""

    learning_rate: float
    losses: dict[float, float | None]
    place: Literal["interior", "edge", "named"]

    @classmethod
    def of(cls, losses: Mapping[float, float | None]) -> Chosen:
        """What a search that is over chooses."""
        best = best_of(losses)
        return cls(best, dict(sorted(losses.items())), "interior" if min(losses) < best < max(losses) else "edge")
