"""Writes a file or a folder whole or not at all.

A kill or a full disk leaves the old one or the new one. A file or a new folder is written beside its place, under a
hidden name, and renamed when it is complete. Several files of a folder that others may use are written into a hidden
folder inside it, which is renamed to `.smoa-save` when they are complete. From then on the save counts: each file is
moved to its place, and what a kill leaves in `.smoa-save` is moved by `recover`, which every save and load calls first.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smoa.errors import ConfigError

SAVE = ".smoa-save"
"""Name of the folder with complete files that are still to be moved to their places."""
STALE = 24 * 3600
"""Seconds after which what a killed save wrote is removed by the next save. None takes as long."""
ATTEMPTS = 1000
"""How often a save finishes those of other processes before its own. More are no processes, but files that stay."""


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
        _share_weights(temporary)
        if not target.exists():
            temporary.chmod(0o755)  # mkdtemp makes it private
            temporary.rename(target)
        elif not keep_existing:
            raise ConfigError(f"{target}: another process created it in the meantime; choose another folder")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; when the block succeeds, the files in it take their places in `folder`, all or none.

    The rest of `folder` is not touched. Every file is flushed to the disk first.
    """
    folder = folder.resolve()
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".smoa-", dir=folder, ignore_cleanup_errors=True) as room:
            temporary = Path(room, folder.name)
            temporary.mkdir()
            yield temporary
            _share_weights(temporary)
            for path in temporary.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    with path.open("rb+" if os.name == "nt" else "rb") as file:  # a read-only file can be flushed too
                        os.fsync(file.fileno())
            for _ in range(ATTEMPTS):
                try:
                    temporary.rename(folder / SAVE)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                _finish_save(folder)  # another process's
            else:
                raise ConfigError(f"{folder / SAVE}: is in the way of a save, and can't be finished; delete it")
        _finish_save(folder, written_here=True)
    finally:
        if is_new:
            with suppress(OSError):  # there are files in it
                folder.rmdir()


def _share_weights(folder: Path) -> None:
    """Give weights the mode of new files: safetensors writes them for their owner alone."""
    with tempfile.TemporaryDirectory(dir=folder) as room:
        (new := Path(room, "new")).touch()
        mode = stat.S_IMODE(new.stat().st_mode)
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


def _remove_stale(folder: Path) -> None:
    """Remove what saves into `folder` that were killed long ago had begun to write."""
    for room in folder.glob(".smoa-*"):
        with suppress(OSError):
            begun = [entry.name for entry in room.iterdir()] == [folder.name]  # else it is no save's
            if begun and room.name != SAVE and _is_own(room) and time.time() - room.stat().st_mtime > STALE:
                shutil.rmtree(room)


def recover(folder: str | Path) -> None:
    """Move to their places the files that a killed save left in `.smoa-save`, if this process may."""
    with suppress(OSError):
        _finish_save(Path(folder).resolve())


def drop_save(folder: Path) -> None:
    """Remove the files of a killed save that have newer ones in their places now, and move the others."""
    with suppress(OSError):
        for file in (folder / SAVE).iterdir() if _is_own(folder / SAVE) else ():
            if file.is_file():
                file.unlink()
    recover(folder)


def _finish_save(folder: Path, written_here: bool = False) -> None:
    """Move the files from `.smoa-save` to their places, JSON last in each folder; several processes may do so at once.

    Those of a save into the parent folder come first, since it may have saved an adapter into this one. Only what this
    process has written is moved through links: what lies in a downloaded folder may be a trap.
    """
    for saved in (folder.parent / SAVE, folder / SAVE):
        if not _is_own(saved):
            continue
        for place, _, names in os.walk(saved, topdown=False, onerror=_raise):
            for name in sorted(names, key=lambda name: name.endswith(".json")):
                file = Path(place, name)
                target = saved.parent / file.relative_to(saved)
                if target.parent.resolve() != target.parent and not (written_here and saved.parent == folder):
                    continue
                with suppress(FileNotFoundError):  # another process was quicker
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)
            with suppress(OSError):  # gone, or the folder of another process's next save
                Path(place).rmdir()


def _is_own(saved: Path) -> bool:
    """Whether this is no link and this user's, if it exists."""
    try:
        status = saved.lstat()
    except FileNotFoundError:  # another process has moved all of it
        return True
    return stat.S_ISDIR(status.st_mode) and (os.name == "nt" or status.st_uid == os.getuid())


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
