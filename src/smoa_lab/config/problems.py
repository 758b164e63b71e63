"""Problems of a config, each with the key that it is about, and all of them as one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What is wrong with one key; ``path`` is the key's, so that its line can be found."""

    path: tuple[str, ...]
    text: str


def listed(problems: Sequence[str]) -> str:
    """``2 problems``, then one a line."""
    return "\n  ".join([f"{len(problems)} problem{'s' if len(problems) > 1 else ''}", *problems])
