"""The folder in which prepared models and data are cached, and the content that names what is in it."""

from __future__ import annotations

import hashlib
import os
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
