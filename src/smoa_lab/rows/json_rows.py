"""Decodes rows from JSON: one line at a time, or a whole list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from smoa_lab.rows.faults import SHOWN, Fault, excerpt, found

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

    def items(self, text: str) -> Iterator[dict[str, Any] | Fault]:
        """The rows of a list.

        Raises:
            ValueError: it is not a list, or what follows can't be decoded.
        """
        at = _skip_blanks(text, 0)
        if at == len(text):
            return
        if text[at] != "[":
            raise ValueError(
                f"begins with {text[at]!r}, expected a list of objects, [{{…}}, {{…}}]; "
                "if there is one object in each line, name the file .jsonl"
            )
        at = _skip_blanks(text, at + 1)
        is_over = text.startswith("]", at)
        for number in count(1):
            if is_over:
                break
            self._repeated.clear()
            try:
                value, end = self._decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                place = error.pos if isinstance(error, json.JSONDecodeError) else at
                around = excerpt(text[place : place + 60]) if place < len(text) else "the file ends within it"
                raise ValueError(f"row {number} is not JSON ({_reason(error)}): {around}") from error
            yield self._row(value, f"item {number}")
            at = _skip_blanks(text, end)
            is_over = text.startswith("]", at)
            if not is_over and not text.startswith(",", at):
                what = repr(text[at]) if at < len(text) else "the end of the file"
                raise ValueError(f"found {what}, expected a comma or ]; the list is damaged")
            at = at if is_over else _skip_blanks(text, at + 1)
        at = _skip_blanks(text, at + 1)
        if at < len(text):
            raise ValueError(f"found {text[at]!r} after the end of the list, expected one list and nothing else")

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


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has thousands of digits"


def _skip_blanks(text: str, at: int) -> int:
    blanks = BLANKS.match(text, at)
    return blanks.end() if blanks else at
