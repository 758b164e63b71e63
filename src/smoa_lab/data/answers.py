"""Whether a written answer is right, by the metrics that a config may name."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Literal

Metric = Literal["exact", "number", "contains", "choice", "score"]
NUMBER = re.compile(r"(?:(?<!\w)[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-−+]?\d{1,3}(?!\d))?")


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


RULES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, right: answer.split() == right.split(),
    "number": lambda answer, right: _last_number(right) is not None and _last_number(answer) == _last_number(right),
    "contains": lambda answer, right: " ".join(right.split()) in " ".join(answer.split()),
}
"""Whether an answer is right, by the completion: for the metrics that need answers. White space makes no difference."""
OWN: Metric = "score"
"""What a function of the user's makes of answers; only the command names it: ``--metric FILE:NAME``."""
ANSWERED = (*RULES, OWN)
"""The metrics that need answers."""
SCORES = {"accuracy": "accuracy", **{name: f"right answers ({name})" for name in RULES}, OWN: OWN}
"""The scores of rows beside the loss, and what they are called. All are shares of rows but the user's own."""


def shown_as(name: str) -> tuple[int, int, str]:
    """How a score is shown: so many times as large, with so many digits, and a sign behind it."""
    return (1, 3, "") if name == OWN else (100, 1, " %")
