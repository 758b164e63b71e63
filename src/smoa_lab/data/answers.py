"""Whether a written answer is right, by the metrics that a config may name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

MetricName = Literal["exact", "number", "contains", "choice", "score"]
MARK = "####"
"""What stands before the number that counts, as in GSM8K."""
NUMBER = re.compile(
    r"""
    (?P<other> (?<!\w) (?: \d+ (?::\d+)+ | \d{1,4} ([-./]) \d{1,2} \2 \d{1,4} ) (?!\w) )      # a time, a date
    | (?P<sign> (?<!\w) [-−–] [$€£¥]? )? (?<!\w)
      (?: (?P<mixed> \d{1,3} ) [ ] (?= \d+ / \d+ (?![\d/]) ) )?                            # the 2 of 2 1/2
      (?P<whole> [1-9]\d{0,2} (?: ,\d{3} )+ (?!\d) | [1-9]\d{0,2} (?: [ '’\u00a0\u202f]\d{3} )+ (?!\d)
               | [1-9]\d{0,2} (?: \.\d{3} )+ (?= ,\d+ (?![.\d]) )
               | [1-9]\d{0,2} (?: \.\d{3} ){2,} (?! \d | \.\d ) | \d+ )?
      (?P<part> (?(whole) [.,] | \. ) \d+ )?
      (?(whole) | (?(part) | (?!) ) )
      (?P<power> [eE] [-−+]? \d{1,3} (?!\d) )?
      (?: \s? [x×*·] \s? 10 \^ (?P<ten> [-−+]? \d{1,3} ) (?!\d) | \^ (?P<exponent> \d{1,3} ) (?!\d) )?
      (?: \s? / \s? (?P<under> \d+ ) )?
    """,
    re.VERBOSE,
)
"""A number with its sign, fraction, grouping and power: 1,234.5, 1 234,5 and 1.234,5, 3/4 and 2 1/2, -2 and -$2, 6e23,
6 x 10^23 and 2^3; not the 2 of m2. A time or a date is no number, and is taken as it is written."""
BEFORE = (
    r"(?<![\w\-−–])(?<!\d[.,:/])"
    + "".join(rf"(?<!\b(?i:{word}) )" for word in ("not", "no", "never"))
    + "(?<!(?i:n't) )"
)
"""What may stand before words that an answer contains: no part of a longer word, and no word that denies them."""


def numbers(text: str) -> list[Fraction | str]:
    """Those of a text, behind its last ``####`` if it has one; what is written like a time or a date as text."""
    found: list[Fraction | str] = []
    for match in NUMBER.finditer(unicodedata.normalize("NFC", text).rpartition(MARK)[2]):
        if match["other"]:
            found.append(match["other"])
            continue
        whole = re.sub(r"\D", "", match["whole"] or "0")
        value = Fraction(f"{whole}{(match['part'] or '').replace(',', '.')}{(match['power'] or '').replace('−', '-')}")
        value *= Fraction(10) ** int((match["ten"] or "0").replace("−", "-"))
        value **= int(match["exponent"] or 1)
        value = value / Fraction(match["under"]) if int(match["under"] or 0) else value
        value += int(match["mixed"] or 0)
        found.append(-value if match["sign"] else value)
    return found


def _is_number(answer: str, right: str) -> bool:
    """Whether the last number is the right one, or the last ones where several are behind ``####``."""
    wanted = numbers(right) if MARK in right else numbers(right)[-1:]
    return wanted != [] and numbers(answer)[-len(wanted) :] == wanted


def is_one_number(text: str) -> bool:
    """Whether it is plain which number of a completion counts."""
    found = numbers(text)
    return bool(found) and not isinstance(found[-1], str) and (len(found) == 1 or MARK in text)


def _words(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _contains(answer: str, right: str) -> bool:
    return re.search(rf"{BEFORE}{re.escape(_words(right))}(?!\w|[.,:/]\d)", _words(answer)) is not None


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
