"""Whether a written answer is right: by the metrics that a config may name, or by a function ``(answer, row) -> float``
of the user's, which ``--metric FILE:NAME`` names; higher is better."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from runpy import run_path
from typing import Any, Literal
from unicodedata import normalize

from smoa.errors import ConfigError, DataError
from smoa_lab.basics.files import content_of
from smoa_lab.basics.settings import TRUSTED
from smoa_lab.basics.values import nearest, portable
from smoa_lab.data.formats import shown

MetricName = Literal["exact", "number", "contains", "choice", "score"]
MARK = "####"
"""What stands before the number that counts, as in GSM8K."""
NUMBER = re.compile(r"(?:(?<!\w)[-−]\$?)?(?<!\w)(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?(?:/\d+)?")
"""A number with its sign, thousands, decimals, power or fraction: 1,234.5, -$2, 6e23 and 3/4; not the 2 of m2."""


def numbers(text: str) -> list[Fraction]:
    """Those of a text, behind its last ``####`` if it has one."""
    found = []
    for match in NUMBER.findall(text.rpartition(MARK)[2]):
        value, _, under = match.replace(",", "").replace("$", "").replace("−", "-").partition("/")
        with suppress(ZeroDivisionError):
            found.append(Fraction(value) / Fraction(under or 1))
    return found


def _is_number(answer: str, right: str) -> bool:
    """Whether the last number is the right one, or the last ones where several are behind ``####``."""
    wanted = numbers(right) if MARK in right else numbers(right)[-1:]
    return wanted != [] and numbers(answer)[-len(wanted) :] == wanted


def _words(text: str) -> str:
    return " ".join(normalize("NFC", text).split())


def _contains(answer: str, right: str) -> bool:
    return re.search(rf"(?<![\w.,-]){re.escape(_words(right))}(?!\w|[.,]\d)", _words(answer)) is not None


RULES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, right: _words(answer) == _words(right),
    "number": _is_number,
    "contains": _contains,
}
"""Whether an answer is right, by the completion: for the metrics that need answers. White space makes no difference."""
OWN: MetricName = "score"
"""What a function of the user's makes of answers; only the command names it: ``--metric FILE:NAME``."""
ANSWERED = (*RULES, OWN)
"""The metrics that need answers."""
TITLES = {"accuracy": "accuracy", **{name: f"right answers ({name})" for name in RULES}, OWN: OWN}
"""The metrics of rows beside the loss, and what they are called. All are shares of rows but the user's own."""


def shown_as(name: str) -> tuple[int, int, str]:
    """How a metric is shown: so many times as large, with so many digits, and a sign behind it."""
    return (1, 3, "") if name == OWN else (100, 1, " %")


class OwnMetric:
    """The function, loaded from the file that the command names. ``name`` has both, and the SHA-256 of the file."""

    def __init__(self, given: str) -> None:
        self.place = f"--metric {given}"
        file, _, name = given.rpartition(":")
        with redirect_stdout(sys.stderr):  # stdout is for what the command prints
            found = run_path(str(Path(file).expanduser()), run_name="smoa_own_metric") if file else {}
        self.function: Any = found.get(name)
        if not callable(self.function):
            told = f"there is no function {name!r}{nearest(name, found)}"
            raise ConfigError(f"{self.place}: {told}; write it as FILE.py:NAME")
        self.score = cache(self._score)  # it may be slow, and references are scored twice before a run
        self.name = f"{portable(given)} {content_of(Path(file).expanduser())}"

    def _score(self, answer: str, row: str, where: str) -> float:
        """What the function makes of an answer to ``row``, JSON of the place ``where``."""
        try:
            with redirect_stdout(sys.stderr):
                value = float(self.function(answer, json.loads(row)))
            if not math.isfinite(value):
                raise ValueError(f"it returned {value}")
        except Exception as error:
            problem = f"{self.place}: fails on the answer {shown(answer)}: {type(error).__name__}: {error}"
            raise DataError(f"{where}: {problem}; return a finite number, or fix the row") from error
        return value


def own_metric(known: str | None = None) -> OwnMetric:
    """The function that the command names; raises ConfigError if it names none, such as the one that is ``known``."""
    if TRUSTED.metric is None:
        needed = (known or "FILE.py:NAME ").rpartition(" ")[0]
        raise ConfigError(f"data.metric: {OWN} is a function that only the command names: give --metric {needed}")
    return _loaded(TRUSTED.metric, Path(TRUSTED.metric.rpartition(":")[0]).expanduser().stat().st_mtime_ns)


@cache
def _loaded(given: str, changed: int) -> OwnMetric:
    """As its file is since it was ``changed``."""
    return OwnMetric(given)
