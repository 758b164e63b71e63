"""Where prepared models and data are kept, and how a file gets there whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """``$SMOA_CACHE``, or the platform's cache folder followed by ``smoa``. Nothing is created."""
    chosen = os.environ.get("SMOA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "smoa" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "smoa"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoa"
