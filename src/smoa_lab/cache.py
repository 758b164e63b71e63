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


def write_whole(target: Path, content: str | bytes) -> None:
    """Write ``content`` to ``target`` so that no reader ever sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
