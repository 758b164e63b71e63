"""Whether a written answer is right, by the metrics that a config may name."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Literal

Metric = Literal["exact", "number", "contains", "choice"]
NUMBER = re.compile(r"(?:(?<!\w)[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


RULES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, right: answer.split() == right.split(),
    "number": lambda answer, right: _last_number(right) is not None and _last_number(answer) == _last_number(right),
    "contains": lambda answer, right: " ".join(right.split()) in " ".join(answer.split()),
}
"""Whether an answer is right, by the completion: for the metrics that need answers. White space makes no difference."""
SHARES = {"accuracy": "accuracy", **{name: f"right answers ({name})" for name in RULES}}
"""The scores that are shares of rows, and what they are called."""
