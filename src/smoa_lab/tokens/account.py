"""Counts what rows are like while they are read: lengths, bad rows, repeated rows, what is cut or dropped."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from smoa.errors import DataError

FIRST = 16
"""Tokens: the bound of the shortest rows in a histogram."""
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99}
"""The quantiles of the rows' lengths that are told."""
SHOWN = 10
"""Bad rows that are listed; the rest are counted."""


@dataclass
class RowsAccount:
    """What one reading found. ``cut`` rows are longer than ``max_length``; ``dropped`` ones have nothing within it that
    is trained. ``repeated`` rows are kept; ``also_in_test`` ones are left out of training."""

    max_length: int | None
    formats: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    repeated: int = 0
    also_in_test: int = 0
    bad: int = 0
    faults: list[str] = field(default_factory=list)

    def add_bad(self, text: str) -> None:
        """Count a bad row, and keep its text if it is among the first."""
        self.bad += 1
        if len(self.faults) < SHOWN:
            self.faults.append(text)

    def add(self, length: int, trained: int) -> bool:
        """Count a row of ``length`` tokens, of which so many are trained within ``max_length``; false if none are."""
        self.lengths.append(length)
        self.cut += self.max_length is not None and length > self.max_length
        self.dropped += not trained
        self.trained += trained
        return trained > 0

    def plain(self) -> dict[str, Any]:
        """The account as values that JSON has."""
        return {
            "max_length": self.max_length,
            "format": ", ".join(self.formats),
            "parts": dict(self.parts),
            "tokens": length_summary(self.lengths),
            "trained_tokens": self.trained,
            **{name: getattr(self, name) for name in ("cut", "dropped", "repeated", "also_in_test", "bad", "faults")},
        }


def length_summary(lengths: array[int]) -> dict[str, Any]:
    """Total and quantiles, and how many rows are at most 16, 32, 64, … tokens long and longer than the bound before."""
    if not lengths:
        return {"total": 0, "histogram": []}
    order = sorted(lengths)
    bounds = [FIRST]
    while bounds[-1] < order[-1]:
        bounds.append(2 * bounds[-1])
    places = Counter(bisect_left(bounds, length) for length in order)
    quantile = {name: order[int(share * (len(order) - 1))] for name, share in QUANTILES.items()}
    return {
        "total": sum(order),
        "shortest": order[0],
        **quantile,
        "longest": order[-1],
        "histogram": [[bound, places[number]] for number, bound in enumerate(bounds)][min(places) :],
    }


def histogram_lines(histogram: list[list[int]]) -> list[str]:
    """A bar for each range of lengths: ``  17–32  ████  12``."""
    most = max(count for _, count in histogram)
    lows = [bound // 2 + 1 if bound > FIRST else 1 for bound, _ in histogram]
    return [
        f"{f'{low}–{bound}':>13}  {'█' * round(40 * count / most):40}  {count:,}"
        for low, (bound, count) in zip(lows, histogram, strict=True)
    ]


def require_good_rows(account: dict[str, Any], skip: bool) -> None:
    """Raise DataError that counts the bad rows and lists the first, unless they are to be skipped."""
    if not account["bad"] or skip:
        return
    listed = "\n  ".join(account["faults"])
    more = account["bad"] - len(account["faults"])
    raise DataError(
        f"{account['bad']:,} bad row{'s' * (account['bad'] > 1)}; nothing is trained until they are mended, or "
        f"data.skip_bad_rows: true leaves them out\n  {listed}" + (f"\n  and {more:,} more" if more else "")
    )
