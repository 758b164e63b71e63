"""Decodes rows from JSON: one line at a time, or a long list piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from smoa_lab.rows.faults import SHOWN, Fault, excerpt, found

EDGE = 16
"""An error this close to the end of the text that was read, in characters, may come from the cut: only strings are
longer."""
BLANKS = re.compile(r"[ \t\r\n]*")


class RowDecoder:
    """Decodes rows, and notices keys that an object has twice: a JSON reader keeps only the last of them."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def line(self, text: str, place: str) -> dict[str, Any] | Fault:
        """The row of one line; ``place`` is such as "line 3"."""
        self._repeated.clear()
        try:
            return self._row(self._decoder.decode(text), place)
        except (ValueError, RecursionError) as error:
            problem = f"{place} is not JSON ({_reason(error)}): {excerpt(text.strip())}"
            return Fault(None, f"{problem}; expected one whole object in each line")

    def items(self, pieces: Iterable[str]) -> Iterator[dict[str, Any] | Fault]:
        """The rows of a list that arrives in pieces.

        Raises:
            ValueError: it is not a list, or what follows can't be decoded.
        """
        text = _Pieces(pieces)
        opening = text.take()
        if not opening:
            return
        if opening != "[":
            raise ValueError(
                f"begins with {opening!r}, expected a list of objects, [{{…}}, {{…}}]; "
                "if there is one object in each line, name the file .jsonl"
            )
        if text.sign() != "]":
            yield from self._items(text)
        else:
            text.take()
        if text.sign():
            raise ValueError(f"found {text.sign()!r} after the end of the list, expected one list and nothing else")

    def _items(self, text: _Pieces) -> Iterator[dict[str, Any] | Fault]:
        for number in count(1):
            yield self._row(self._value(text, number), f"item {number}")
            sign = text.take()
            if sign == "]":
                return
            if sign != ",":
                what = repr(sign) if sign else "the end of the file"
                raise ValueError(f"found {what}, expected a comma or ]; the list is damaged")

    def _value(self, text: _Pieces, number: int) -> object:
        """The next item of the list. What was read of it may end within it: then more is read."""
        while True:
            self._repeated.clear()
            text.sign()
            try:
                value, end = self._decoder.raw_decode(text.text, text.at)
            except (ValueError, RecursionError) as error:
                if not (text.may_be_cut(error) and text.more()):
                    raise ValueError(f"row {number} is not JSON ({_reason(error)}): {_around(text, error)}") from error
                continue
            if end < len(text.text) or not text.more():  # a number may go on in the next piece
                text.at = end
                return value

    def _row(self, value: object, place: str) -> dict[str, Any] | Fault:
        if self._repeated:
            key = repr(self._repeated[0][:SHOWN])[1:-1]
            return Fault(key, f"{place} has this key twice in one object; keep one")
        if isinstance(value, dict):
            return value
        hint = "; a list of rows goes into a .json file" if isinstance(value, list) else ""
        return Fault(None, f"{place} is not a JSON object but {found(value)}; expected an object with columns{hint}")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            self._repeated += [key for key in row if keys.count(key) > 1]
        return row


class _Pieces:
    """A text of which only the part around the next row is held; ``at`` is where that row begins."""

    def __init__(self, pieces: Iterable[str]):
        self._pieces = iter(pieces)
        self.text = ""
        self.at = 0

    def sign(self) -> str:
        """The next character that is not blank, or nothing at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self) -> str:
        """Return what :meth:`sign` does, and go on behind it."""
        sign = self.sign()
        self.at += len(sign)
        return sign

    def more(self) -> bool:
        """Read at least as much as is held, so that a long row is not decoded once for each piece of it."""
        held = len(self.text) - self.at
        added: list[str] = []
        for piece in self._pieces:
            added.append(piece)
            held -= len(piece)
            if held <= 0:
                break
        if added:
            self.text, self.at = "".join([self.text[self.at :], *added]), 0
        return bool(added)

    def may_be_cut(self, error: Exception) -> bool:
        """Whether the text was at fault only because it ends here."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - EDGE


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has thousands of digits"


def _around(text: _Pieces, error: Exception) -> str:
    at = error.pos if isinstance(error, json.JSONDecodeError) else text.at
    return excerpt(text.text[at : at + 60]) if at < len(text.text) else "the file ends within it"
