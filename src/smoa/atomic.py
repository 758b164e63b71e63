"""Writes a file whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; the file takes its place when the block succeeds.

    A kill or a full disk leaves the old file or the new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(target: Path, content: str | bytes) -> None:
    """Write `content` to `target`; nobody who reads the file ever sees half of it."""
    with new_file(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
