"""A study's finished runs: a JSON each, in its own file or packed into ``runs.jsonl.gz``, never overwritten.

The pack has a line of JSON for each run, sorted by name.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError
from smoa_lab.basics.plain import finite
from smoa_lab.training.run_folder import provenance

logger = logging.getLogger(__name__)

PACK = "runs.jsonl.gz"
_OWN_FILES = ("untouched.json", "tuning/**/*.json", "final/**/*.json")
_REMEDY = "restore the file from a copy; without one, delete what is damaged and run smoa compare again"


@dataclass(frozen=True)
class Trial:
    """A run of an entry; ``tuning`` is scored on the validation part, ``final`` on the test part."""

    stage: Literal["tuning", "final"]
    entry: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.entry}/lr-{self.learning_rate:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Untouched:
    """The model as it is, scored on the test part."""

    name: str = "untouched"


Job = Trial | Untouched
Result = dict[str, Any]
"""The JSON of a finished job."""


class TrialStore:
    """The results of a study under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def names(self, under: str = "") -> list[str]:
        """The finished trials whose names begin with ``under``, sorted."""
        names = {*own_files(self.folder), *packed_runs(self.folder)}  # in this order: packing removes files last
        return sorted(name for name in names if name.startswith(under))

    def find(self, name: str) -> Result | None:
        """A finished trial's JSON, from its own file or from the pack.

        Raises:
            DataError: either is damaged.
        """
        file = self.file(name)
        try:
            return _parse(file.read_text(encoding="utf-8"), str(file))
        except FileNotFoundError:
            line = packed_runs(self.folder).get(name)
        return None if line is None else _parse(line, self._place(name))

    def get(self, name: str, config: dict[str, Any], run: Callable[[Path], Result], waits: bool = True) -> Result:
        """The finished trial, or else ``run(work folder)``, stored. Where another process runs it, that is waited for.

        Raises:
            ConfigError: a trial of that name was run by another config.
            Timeout: another process runs it, and ``waits`` is False.
        """
        result = self.finished(name, config)
        if result is None:
            lock = self._lock(name)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=-1 if waits else 0):
                result = self.finished(name, config) or self._run(name, run)
            lock.unlink(missing_ok=True)  # whoever waits for it, or makes a new one, finds the stored run
        return result

    def is_running(self, name: str) -> bool:
        """Whether a process runs the trial now, on this machine or on another one that shares the folder."""
        if not self._lock(name).is_file():
            return False
        try:
            with FileLock(self._lock(name), timeout=0):
                return False
        except Timeout:
            return True

    def finished(self, name: str, config: dict[str, Any]) -> Result | None:
        """The finished trial; raises ConfigError if it was run by another config."""
        if (result := self.find(name)) is None:
            return None
        stored, wanted = _comparable(result["config"]), _comparable(config)
        differing = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
        if differing:
            raise ConfigError(
                f"{self._place(name)}: was run with other values of {', '.join(differing)}; give the changed one "
                "another folder (folder of a study, training.output_dir of a run), or move this file or line away to "
                "run it again"
            )
        return result

    def _run(self, name: str, run: Callable[[Path], Result]) -> Result:
        work = self.folder / "work" / name
        logger.info("%s", name)
        result = finite(run(work))
        seed = int(result["config"]["training"].get("seed", 0))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        made = {"format": 1, "name": name, "provenance": provenance(seed, device)}
        result = {**made, **result, "config": _comparable(result["config"])}
        write_whole(self.file(name), _line(result))
        shutil.rmtree(work, ignore_errors=True)
        return result

    def _lock(self, name: str) -> Path:
        """Held by the process that runs the trial; the system releases it when that process dies."""
        return self.folder / "work" / "locks" / f"{name.replace('/', '_')}.lock"

    def _place(self, name: str) -> str:
        """Where a finished trial is kept, for messages."""
        file = self.file(name)
        return str(file) if file.is_file() else f"{self.folder / PACK}: {name}"


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without where it was run, and what a study does not show."""
    hidden = {"training": "output_dir", "task": "samples"}
    return {
        key: {name: value for name, value in section.items() if name != hidden[key]} if key in hidden else section
        for key, section in config.items()
        if key != "forgetting"
    }


def own_files(folder: Path) -> dict[str, Path]:
    """The runs of a study that have a JSON file of their own, by name."""
    files = sorted(file for pattern in _OWN_FILES for file in folder.glob(pattern))
    return {file.relative_to(folder).as_posix().removesuffix(".json"): file for file in files}


def packed_runs(folder: Path) -> Mapping[str, str]:
    """The lines of a study's pack by the run's name; none before anything is packed.

    Raises:
        DataError: the pack is damaged.
    """
    file = folder / PACK
    try:
        state = file.stat()
    except FileNotFoundError:
        return {}
    return _read(file, (state.st_ino, state.st_size, state.st_mtime_ns))


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
            line = _line({**_parse(file.read_text(encoding="utf-8"), str(file)), "name": name})
            if runs.setdefault(name, line) != line:
                raise DataError(f"{file}: {folder / PACK} contains another run of this name; delete one of the two")
        content = io.BytesIO()  # equal runs give equal bytes: sorted, no time or name in gzip's header
        with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=content, mtime=0) as compressed:
            compressed.writelines(runs[name].encode() for name in sorted(runs))
        write_whole(folder / PACK, content.getvalue())
        with (folder / PACK).open("r+b") as written:
            os.fsync(written.fileno())
        for file in files.values():
            file.unlink()
    logger.info("%d runs packed, %d in all: %s", len(files), len(runs), folder / PACK)


def shell_command(name: str) -> str:
    """What prints the packed runs whose names begin with ``name``, in the study's folder."""
    return f'gzip -dc {PACK} | grep -F \'"name":"{name}\''


def _line(run: dict[str, Any]) -> str:
    """A run's JSON in one line, as it is written into its own file and into the pack."""
    return json.dumps(run, ensure_ascii=False, separators=(",", ":")) + "\n"


class _Stored(dict[str, Any]):
    """An object within a run's JSON. Whoever needs a key that it lacks gets a DataError that names ``place``."""

    place = ""

    def __missing__(self, key: str) -> Any:
        raise DataError(f"{self.place}: is damaged, it lacks {key!r}; {_REMEDY}")


def _parse(text: str, place: str) -> Result:
    """The run of a file or line; raises DataError, which names ``place``, where it is not a JSON object."""

    def placed(values: dict[str, Any]) -> _Stored:
        stored = _Stored(values)
        stored.place = place
        return stored

    try:
        run = json.loads(text, object_hook=placed)
        if not isinstance(run, dict):
            raise ValueError(f"found {type(run).__name__}")
    except ValueError as error:
        raise DataError(f"{place}: is not a JSON object ({error}); {_REMEDY}") from error
    return run


@lru_cache(maxsize=2)  # a report reads every run several times
def _read(file: Path, version: tuple[int, int, int]) -> Mapping[str, str]:
    runs: dict[str, str] = {}
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                run = _parse(line, f"{file}: line {len(runs) + 1}")
                runs[str(run.get("name"))] = line.rstrip("\n") + "\n"
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: line {len(runs) + 1}: is damaged or cut off ({error}); {_REMEDY}") from error
    return runs
