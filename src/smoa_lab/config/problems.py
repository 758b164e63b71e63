"""What is wrong with one key of a config, and the valid name nearest to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """``path`` is the key's, so that its line can be found."""

    path: tuple[str, ...]
    text: str


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the list to choose from where it is short, or nothing."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= 12 else ""
