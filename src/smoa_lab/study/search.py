"""The search for a learning rate.

It goes downhill in quarter decades from the rate that an entry names, until the best has neighbors on both sides. The
chosen rate is the vertex of the parabola through these three, over the logarithm of the rate. An index counts quarter
decades from the named rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeVar

Key = TypeVar("Key")
STARTS = 3
"""Runs that every search begins with."""


def rate(start: float, index: float) -> float:
    """start · 10^(index / 4) to two digits; the start itself is taken as it is."""
    return float(f"{start * 10 ** (index / 4):.1e}") if index else start


def rate_text(learning_rate: float) -> str:
    """``2e-3``: a rate in names of folders and in tables, with all its digits."""
    return f"{Decimal(repr(learning_rate)).normalize():e}".replace("e+", "e")


def next_indices(losses: Mapping[int, float | None], max_runs: int, untouched: float | None = None) -> list[int]:
    """The indices that the search needs next, whatever comes out at any of them; none when it is over, or ``max_runs``
    are spent. ``losses`` by index; None is a run that diverged. Where none is below that of the ``untouched`` model, as
    far as it is known, all rates are too high: the search goes down in half decades."""
    needed = [index for index in (0, -1, 1) if index not in losses]
    if not needed:
        best = best_of(losses)
        reached = losses[best]
        if reached is None or (untouched is not None and not reached < untouched):
            needed = [min(losses) - 2]
        else:
            needed = [index for index in (best - 1, best + 1) if index not in losses][:1]
    return needed[: max(0, max_runs - len(losses))]


def best_of(losses: Mapping[Key, float | None]) -> Key:
    """Where the loss is lowest; a diverged run is never the best, the lower of two equals is."""
    ordered: Any = losses
    best: Key = min(ordered, key=lambda key: (losses[key] is None, losses[key] or 0.0, key))
    return best


@dataclass(frozen=True)
class Chosen:
    """The rate that an entry's final runs take, the losses of its search by rate, and where among them it lies: at a
    ``vertex`` between two that were tried, at one ``interior`` to them, or at the ``edge``, beside which it may do
    better; ``named`` is a rate that was taken without a search."""

    learning_rate: float
    losses: dict[float, float | None]
    place: Literal["vertex", "interior", "edge", "named"]

    @classmethod
    def of(cls, start: float, losses: Mapping[int, float | None]) -> Chosen:
        """What a search from ``start`` that is over chooses; ``losses`` by index."""
        best = best_of(losses)
        tried = {rate(start, index): losses[index] for index in sorted(losses)}
        if not {best - 1, best + 1} <= losses.keys():
            return cls(rate(start, best), tried, "edge")
        chosen = rate(start, best + _beside(*(losses.get(index) for index in (best - 1, best, best + 1))))
        return cls(chosen, tried, "interior" if chosen in tried else "vertex")

    @property
    def tried(self) -> float:
        """The best of the rates that the search tried."""
        return best_of(self.losses) if self.losses else self.learning_rate


def _beside(lower: float | None, best: float | None, upper: float | None) -> float:
    """How far from the middle of three neighbors, which is the lowest, their parabola has its vertex: half a step at
    most, and 0 where one diverged. The lower one is never as low as the best, so they curve."""
    if lower is None or best is None or upper is None:
        return 0.0
    return (lower - upper) / (lower - 2 * best + upper) / 2
