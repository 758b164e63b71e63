"""Writes tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], marks: Sequence[str] = ()) -> str:
    """``marks`` align the columns, as in Markdown; without them the first one is text and the others are numbers."""
    first, *lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    marks = marks or ["---", *["--:"] * (len(header) - 1)]
    return "\n".join([first, f"|{'|'.join(marks)}|", *lines])
