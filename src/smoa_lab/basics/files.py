"""Files and folders that are written whole or not at all, the folder in which models and rows are cached, and what was
stored as JSON."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import platformdirs

from smoa.errors import ConfigError, DataError


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; the file takes its place when the block succeeds.

    A kill, a full disk or a loss of power leaves the old file or the new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{token_hex(8)}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def flush(file: Path) -> None:
    """Wait until the content of `file` is on the disk, before something else says that it is there."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def write_whole(target: Path, content: str | bytes) -> None:
    """Write `content` to `target`; nobody who reads the file ever sees half of it."""
    with new_file(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_new(target: Path) -> None:
    """Raise ConfigError, before any work, if a file or folder exists."""
    if target.exists():
        raise ConfigError(f"{target}: exists and is not overwritten; choose another name")


@contextmanager
def new_folder(target: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it takes the name when the block succeeds and is removed when it fails.

    A folder that exists, at the start or at the end, stays: with `keep_existing` in silence, else by an error.
    """
    if not keep_existing:
        check_new(target)
    temporary = target.with_name(f".{target.name}-{token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not (keep_existing and target.exists()):
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """``$SMOA_CACHE``, or ``smoa`` in the platform's cache folder. Nothing is created."""
    chosen = os.environ.get("SMOA_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("smoa", appauthor=False))


def content_of(file: Path) -> str:
    """SHA-256 of a file: another content may have the same size and time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_stored(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises DataError with the file's name where it is damaged."""
    return read_stored_lines(file)[0]


def read_stored_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in the lines of a gzipped file, or the one of a JSON file, as :func:`read_stored`."""
    try:
        if file.suffix == ".gz":
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                return list(map(json.loads, lines))
        return [json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{file}: is damaged ({error}); put back a copy, or run it again") from error
