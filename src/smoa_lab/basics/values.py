"""Plain values in words and in files: JSON without what is no number, no places of this machine, names for errors."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with each plain value within dictionaries and lists changed."""
    if isinstance(value, dict):
        return {key: _mapped(inside, change) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(inside, change) for inside in value]
    return change(value)


def finite(value: Any) -> Any:
    """``value`` with None for NaN and infinities, also within dictionaries and lists: what a run left that diverged."""
    return _mapped(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def json_text(value: Any) -> str:
    """``value`` as indented JSON, None for what is not finite."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False)


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all blocks of a config, as ``block.key``."""
    blocks = {block: own if isinstance(own, dict) else {"": own} for block, own in config.items()}
    return {f"{block}.{key}".rstrip("."): own[key] for block, own in blocks.items() for key in own}


def portable(value: Any) -> Any:
    """``value`` with only the last name of every absolute path, also within dictionaries and lists."""

    def last_name(leaf: Any) -> Any:
        is_place = isinstance(leaf, str) and (leaf.startswith("~/") or PurePosixPath(leaf).is_absolute())
        is_place = is_place or (isinstance(leaf, str) and PureWindowsPath(leaf).is_absolute())
        return PureWindowsPath(leaf).name if is_place else leaf

    return _mapped(value, last_name)


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
