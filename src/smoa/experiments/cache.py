"""Where prepared models and data are kept, and how a file gets there whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its name when the block ends well and vanishes otherwise.

    If somebody else finished the same folder meanwhile, theirs stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        if not target.exists():
            temporary.chmod(0o755)  # mkdtemp makes it private
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(target: Path, text: str) -> None:
    """Write ``text`` to ``target`` so that no reader ever sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
