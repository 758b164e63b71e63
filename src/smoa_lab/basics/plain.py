"""Plain values for files that leave this machine: finite numbers, no places of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
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
