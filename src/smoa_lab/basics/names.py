"""The name that something gets where its own is taken."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, count


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """``name``, or the first of ``name-2``, ``name-3`` and so on that is free."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(one for one in names if not is_taken(one))
