"""Writes a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(target: Path, content: str | bytes) -> None:
    """Write `content` to `target`: beside it, under a hidden name, and renamed when complete.

    A kill or a full disk leaves the old file or the new one, and nobody who reads it ever sees half of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
