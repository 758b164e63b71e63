"""An entry that a table compares with its reference, and the verdicts of a whole table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from smoa_lab.study.report.results.statistics import Difference, corrected


@dataclass(frozen=True)
class Compared:
    """``difference`` is None for the reference itself, and where nothing can be compared."""

    entry: str
    reference: str
    difference: Difference | None = field(default=None, kw_only=True)


Row = TypeVar("Row", bound=Compared)


def with_holm(found: Sequence[Row]) -> list[Row]:
    """The differences corrected for all comparisons of the table."""
    differences = corrected([one.difference for one in found])
    return [replace(one, difference=changed) for one, changed in zip(found, differences, strict=True)]
