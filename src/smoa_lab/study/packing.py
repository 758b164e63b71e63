"""A study's finished runs in one file: ``runs.jsonl.gz``, a line of JSON for each run, sorted by name."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from smoa.atomic import write_whole
from smoa.errors import DataError

logger = logging.getLogger(__name__)

PACK = "runs.jsonl.gz"
_OWN_FILES = ("untouched.json", "tuning/**/*.json", "final/**/*.json")
_REMEDY = "restore the file from a copy; without one, delete what is damaged and run smoa compare again"


def own_files(folder: Path) -> dict[str, Path]:
    """The runs of a study that have a JSON file of their own, by name."""
    found = sorted(file for pattern in _OWN_FILES for file in folder.glob(pattern))
    return {file.relative_to(folder).as_posix().removesuffix(".json"): file for file in found}


def packed_runs(folder: Path) -> Mapping[str, str]:
    """The lines of a study's pack by the run's name; none before anything is packed.

    Raises:
        DataError: the pack is damaged.
    """
    file = folder / PACK
    try:
        found = file.stat()
    except FileNotFoundError:
        return {}
    return _read(file, (found.st_ino, found.st_size, found.st_mtime_ns))


def pack(folder: Path) -> None:
    """Move all runs that have a file of their own into the pack.

    A run's file is removed only when the pack with that run is on the disk, so that a killed call loses nothing and can
    be repeated.

    Raises:
        DataError: the pack or a run's file is damaged, or the pack contains another run of the same name.
    """
    if not own_files(folder):
        return
    lock = folder / "work" / "packing.lock"
    lock.parent.mkdir(exist_ok=True)
    with FileLock(lock):
        files = own_files(folder)
        runs = dict(packed_runs(folder))
        for name, file in files.items():
            line = as_line({**parse_run(file.read_text(encoding="utf-8"), str(file)), "name": name})
            if runs.setdefault(name, line) != line:
                raise DataError(f"{file}: {folder / PACK} contains another run of this name; delete one of the two")
        _write(folder / PACK, runs)
        for file in files.values():
            file.unlink()
    logger.info("%d runs packed, %d in all: %s", len(files), len(runs), folder / PACK)


def shell_command(name: str) -> str:
    """What prints the packed runs whose names begin with ``name``, in the study's folder."""
    return f'gzip -dc {PACK} | grep -F \'"name":"{name}\''


def as_line(run: dict[str, Any]) -> str:
    """A run's JSON in one line, as it is written into its own file and into the pack."""
    return json.dumps(run, ensure_ascii=False, separators=(",", ":")) + "\n"


def parse_run(text: str, place: str) -> dict[str, Any]:
    """The run of a file or line; raises DataError, which names ``place``, where it is not a JSON object."""
    try:
        run = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place}: is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(run, dict):
        raise DataError(f"{place}: is not a JSON object; {_REMEDY}")
    return run


@lru_cache(maxsize=2)  # a report reads every run several times
def _read(file: Path, version: tuple[int, int, int]) -> Mapping[str, str]:
    runs: dict[str, str] = {}
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                place = f"{file}: line {len(runs) + 1}"
                name = parse_run(line, place).get("name")
                if not isinstance(name, str):
                    raise DataError(f"{place}: has no name; {_REMEDY}")
                if name in runs:
                    raise DataError(f"{place}: {name} is in the file already; delete one of the two lines")
                runs[name] = line.rstrip("\n") + "\n"
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: line {len(runs) + 1}: is damaged or cut off ({error}); {_REMEDY}") from error
    return runs


def _write(file: Path, runs: Mapping[str, str]) -> None:
    """Equal runs give equal bytes: sorted, without a time or file name in gzip's header."""
    content = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=content, mtime=0) as compressed:
        compressed.writelines(runs[name].encode() for name in sorted(runs))
    write_whole(file, content.getvalue())
    with file.open("r+b") as written:
        os.fsync(written.fileno())
