"""Words about names, for errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def first_of(names: Sequence[str], shown: int = 3) -> str:
    """The first names and how many more there are: "a, b, c and 2 more"."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the names to choose from if there are at most 20, or nothing."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= 20 else ""
