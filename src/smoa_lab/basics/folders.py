"""Where files go, and plain values in them: the folder in which models and data are cached, new folders that are
written whole or not at all, and values for files that leave this machine: finite numbers, no places of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from secrets import token_hex
from typing import Any

import platformdirs

from smoa.errors import ConfigError, DataError


def check_new(target: Path) -> None:
    """Raise ConfigError, before any work, if a file or folder exists."""
    if target.exists():
        raise ConfigError(f"{target}: exists and is not overwritten; choose another name")


@contextmanager
def new_folder(target: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it takes the name when the block succeeds and is removed when it fails.

    A folder that exists, at the start or at the end, stays: with `keep_existing` in silence, else by a ConfigError.
    """
    if not keep_existing:
        check_new(target)
    temporary = target.with_name(f".{target.name}-{token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*.safetensors"):
            file.chmod(temporary.stat().st_mode & 0o666)  # as new files have: safetensors writes for the owner alone
        if not target.exists():
            temporary.rename(target)
        elif not keep_existing:
            raise ConfigError(f"{target}: another process created it in the meantime; choose another folder")
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
