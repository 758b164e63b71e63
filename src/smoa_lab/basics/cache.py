"""The folder in which prepared models and data are cached."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """``$SMOA_CACHE``, or ``smoa`` in the platform's cache folder. Nothing is created."""
    chosen = os.environ.get("SMOA_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("smoa", appauthor=False))
