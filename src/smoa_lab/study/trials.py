"""A study's finished runs: a JSON file each, never overwritten."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError
from smoa_lab.basics.plain import finite
from smoa_lab.training.run_folder import provenance

logger = logging.getLogger(__name__)

_FILES = ("untouched.json", "tuning/**/*.json", "final/**/*.json")


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
        files = (file for pattern in _FILES for file in self.folder.glob(pattern))
        names = (file.relative_to(self.folder).as_posix().removesuffix(".json") for file in files)
        return sorted(name for name in names if name.startswith(under))

    def find(self, name: str) -> Result | None:
        """A finished trial's JSON; raises DataError if it is damaged."""
        file = self.file(name)
        try:
            run: Result = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{file}: is not JSON ({error}); delete it to run it again") from error
        return run

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
                f"{self.file(name)}: was run with other values of {', '.join(differing)}; give the changed one "
                "another folder (folder of a study, training.output_dir of a run), or move this file away to run it "
                "again"
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
        text = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
        write_whole(self.file(name), f"{text}\n")
        shutil.rmtree(work, ignore_errors=True)
        return result

    def _lock(self, name: str) -> Path:
        """Held by the process that runs the trial; the system releases it when that process dies."""
        return self.folder / "work" / "locks" / f"{name.replace('/', '_')}.lock"


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without where it was run, and what a study does not show."""
    hidden = {"training": "output_dir", "task": "samples"}
    return {
        key: {name: value for name, value in section.items() if name != hidden[key]} if key in hidden else section
        for key, section in config.items()
        if key != "forgetting"
    }
