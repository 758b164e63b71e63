"""What is wrong with one row, and how a value that was found is described."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from smoa.errors import DataError

SHOWN = 40
"""How much of a text a message shows, in characters."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row: the path of the field, such as ``messages[2].content``, or None where it is the
    whole row; and the problem, which says what was found and what is expected."""

    field: str | None
    problem: str

    def __str__(self) -> str:
        return self.problem if self.field is None else f"{self.field}: {self.problem}"


class BadRow(DataError):  # noqa: N818 - says what is bad, as Fault says why
    """A row can't be trained on. ``fault`` says why."""

    def __init__(self, fault: Fault):
        super().__init__(fault)
        self.fault = fault


def bad(field: str | None, problem: str) -> BadRow:
    """The error to raise for a field."""
    return BadRow(Fault(field, problem))


def found(value: object) -> str:
    """A value in a few words, however long it is."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if abs(value) >= 10**15:
            return "a large number"
        case int() | float():
            return f"the number {value!r}"
        case str():
            return excerpt(value)
        case list() | tuple():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {names(value) or 'no keys'}"
    return f"a value of the type {type(value).__name__}"


def excerpt(text: str) -> str:
    """The beginning of a text, in quotes."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"


def names(keys: Iterable[object]) -> str:
    """Columns or keys in quotes, the first ten of them."""
    quoted = [excerpt(str(key)) for key in keys]
    return ", ".join(quoted[:10]) + (", …" if len(quoted) > 10 else "")
