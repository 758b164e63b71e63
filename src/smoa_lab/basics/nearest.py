"""The valid name nearest to a wrong one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 20
"""Names that an error message lists at most."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the names to choose from if there are few, or nothing."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= LISTED else ""
