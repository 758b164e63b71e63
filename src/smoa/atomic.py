"""Writes a file or a folder whole or not at all.

A kill or a full disk leaves the old one or the new one. It is written beside its place, under a hidden name, and
renamed when it is complete. A folder cannot be renamed over another one, so the old folder `NAME` first becomes
`.NAME.smoa-old`. A kill between the two renames leaves it there; `recover` puts it back, and every save and load calls
it first. A folder that can't be renamed, such as a mount point, stays; each of its files is replaced whole.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smoa.errors import ConfigError

IMMOVABLE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)
"""Errors of renaming a mount point, a folder of an image's lower layer, or one whose parent is not writable."""


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; the file takes its place when the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_place(target: Path, is_new: bool = False) -> None:
    """Find out before any work whether a file or folder can be written, by trying. Nothing is left behind.

    Raises:
        ConfigError: nothing can be written there or, if it `is_new`, it exists.
    """
    if is_new and os.path.lexists(target):
        raise ConfigError(f"{target}: exists and is not overwritten; choose another name")
    try:
        if target.is_dir() and not is_new:
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        with tempfile.TemporaryFile(dir=next(above for above in target.absolute().parents if above.exists())):
            pass
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); choose another place") from error


def write_whole(target: Path, content: str | bytes) -> None:
    """Write `content` to `target`; nobody who reads the file ever sees half of it."""
    with new_file(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_folder(target: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it takes the name when the block succeeds and is removed when it fails.

    Args:
        keep_existing: If another process has made the folder, keep that one and remove ours.

    Raises:
        ConfigError: the folder exists, at the start or at the end, and `keep_existing` is False.
    """
    if target.exists() and not keep_existing:
        raise ConfigError(f"{target}: exists; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        if not target.exists():
            temporary.chmod(0o755)  # mkdtemp makes it private
            temporary.rename(target)
        elif not keep_existing:
            raise ConfigError(f"{target}: another process created it in the meantime; choose another folder")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a copy of the folder, or an empty one, that replaces it when the block succeeds; else nothing changes.

    Every file is flushed to the disk before the folder is renamed. If the folder can't be renamed, the files that the
    block wrote replace the old ones, one by one, each whole. A kill may then leave old and new files together.
    """
    target = target.resolve()  # a symlink stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    locked = target.exists() and not os.access(target.parent, os.W_OK)
    place = None if locked else target.parent  # None: the system's folder for temporary files
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=place, ignore_cleanup_errors=True) as room:
        temporary = Path(room) / target.name
        if target.exists():
            shutil.copytree(target, temporary, symlinks=True)
        else:
            temporary.mkdir()
        before = _states(temporary)
        yield temporary
        _flush(temporary)
        try:
            _replace(temporary, target)
        except OSError as error:
            if error.errno not in IMMOVABLE or not target.exists():
                raise
            _replace_files(temporary, target, before)


def recover(folder: str | Path) -> None:
    """Put back a folder that a save, killed between its two renames, left as `.NAME.smoa-old`.

    Nothing happens where the folder exists, or where there is no such old one.
    """
    target = Path(folder).resolve()
    if target.exists():
        return
    with suppress(FileNotFoundError, NotADirectoryError):  # also where another process was quicker
        _old(target).rename(target)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.smoa-old")


def _replace(new: Path, target: Path) -> None:
    try:
        while not _renamed(new, target):
            pass
    finally:
        recover(target)  # where the second rename failed
    shutil.rmtree(_old(target), ignore_errors=True)


def _renamed(new: Path, target: Path) -> bool:
    """Rename the old folder out of the way and the new one into its place; False if a load put the old one back."""
    if target.exists():
        shutil.rmtree(_old(target), ignore_errors=True)  # of a save that was killed after its second rename
        target.rename(_old(target))
    try:
        new.rename(target)
    except OSError:
        if target.exists():
            return False
        raise
    return True


def _replace_files(new: Path, target: Path, before: dict[Path, tuple[int, ...]]) -> None:
    """Replace the files that differ from those before, and remove those that are gone.

    JSON comes last in each folder: a first save that is killed leaves weights without a config, which nobody loads.
    """
    now = _states(new)
    written = (name for name, state in now.items() if before.get(name) != state)
    for name in sorted(written, key=lambda name: (name.parent, name.suffix == ".json")):
        with new_file(target / name) as temporary:
            shutil.copy2(new / name, temporary, follow_symlinks=False)
            _flush_file(temporary)
    for name in before.keys() - now.keys():
        (target / name).unlink(missing_ok=True)


def _states(folder: Path) -> dict[Path, tuple[int, ...]]:
    """The files and links in a folder, each with values that change when it is written."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    stats = {path.relative_to(folder): path.lstat() for path in files}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush_file(path)


def _flush_file(path: Path) -> None:
    if path.is_file() and not path.is_symlink():
        with path.open("rb+" if os.name == "nt" else "rb") as file:  # a read-only file can be flushed too
            os.fsync(file.fileno())
