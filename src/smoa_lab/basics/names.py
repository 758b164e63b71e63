"""Names: the nearest valid one to a wrong one, and the next that is free."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from itertools import chain, count

LISTED = 20
"""Names that an error message lists at most."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the names to choose from if there are few, or nothing."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= LISTED else ""


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """``name``, or the first of ``name-2``, ``name-3`` and so on that is free."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(one for one in names if not is_taken(one))
