"""Plain values without places of this machine, for files that leave it."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


def portable(value: Any) -> Any:
    """``value`` with only the last name of every absolute path, also within dictionaries and lists."""
    if isinstance(value, dict):
        return {key: portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [portable(one) for one in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_of_this_machine(value) else value


def _is_of_this_machine(text: str) -> bool:
    return text.startswith("~/") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
