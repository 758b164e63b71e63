"""Where files go: the folder in which models and data are cached, names by content, and names that are free."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """``$SMOA_CACHE``, or ``smoa`` in the platform's cache folder. Nothing is created."""
    chosen = os.environ.get("SMOA_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("smoa", appauthor=False))


def content_of(file: Path) -> str:
    """SHA-256 of a file: another content may have the same size and time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """``name``, or the first of ``name-2``, ``name-3`` and so on that is free."""
    if not is_taken(name):
        return name
    return next(free for number in count(2) if not is_taken(free := f"{name}-{number}"))
