"""Writes a new folder whole or not at all: beside its place, under a hidden name, and renamed when complete.

A kill or a full disk leaves none or the new one.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from smoa.errors import ConfigError


def check_place(target: Path, is_new: bool = False) -> None:
    """Raise ConfigError, before any work, if a file or folder can't be written or, where it `is_new`, exists. It is
    tried, and nothing is left behind."""
    if is_new and os.path.lexists(target):
        raise ConfigError(f"{target}: exists and is not overwritten; choose another name")
    try:
        if target.is_dir() and not is_new:
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        with tempfile.TemporaryFile(dir=next(above for above in target.absolute().parents if above.exists())):
            pass
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def new_folder(target: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it takes the name when the block succeeds and is removed when it fails.

    A folder that exists, at the start or at the end, stays: with `keep_existing` in silence, else by a ConfigError.
    """
    if target.exists() and not keep_existing:
        raise ConfigError(f"{target}: exists; choose another folder")
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
