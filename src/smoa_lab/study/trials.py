"""Trials: one JSON per finished run, in its own file or packed, named after what was run, never overwritten."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from smoa.atomic import write_whole
from smoa.errors import ConfigError
from smoa_lab.basics.plain_json import finite
from smoa_lab.basics.without_secrets import without_secrets
from smoa_lab.study.packing import PACK, as_line, own_files, packed_runs, parse_run
from smoa_lab.training.run_folder import provenance

logger = logging.getLogger(__name__)

Stage = Literal["tuning", "final"]


@dataclass(frozen=True)
class Trial:
    """A run of an entry; ``tuning`` is scored on the validation part, ``final`` on the test part."""

    stage: Stage
    entry: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.entry}/lr-{self.learning_rate:g}-seed-{self.seed}"


class TrialStore:
    """The results of a study under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def names(self, under: str = "") -> list[str]:
        """The finished trials whose names begin with ``under``, sorted."""
        found = {*own_files(self.folder), *packed_runs(self.folder)}  # in this order: packing removes files last
        return sorted(name for name in found if name.startswith(under))

    def find(self, name: str) -> dict[str, Any] | None:
        """A finished trial's JSON, from its own file or from the pack.

        Raises:
            DataError: either is damaged.
        """
        file = self.file(name)
        try:
            return parse_run(file.read_text(encoding="utf-8"), str(file))
        except FileNotFoundError:
            line = packed_runs(self.folder).get(name)
        return None if line is None else parse_run(line, self._place(name))

    def get(self, name: str, config: dict[str, Any], run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The finished trial, or else ``run(work folder)``, stored. Where another process runs it, that is waited for.

        Raises:
            ConfigError: a trial of that name was run by another config.
        """
        found = self.finished(name, config)
        if found is None:
            lock = self._lock(name)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                found = self.finished(name, config) or self._run(name, run)
            lock.unlink(missing_ok=True)  # whoever waits for it, or makes a new one, finds the stored run
        return found

    def is_running(self, name: str) -> bool:
        """Whether a process runs the trial now, on this machine or on another one that shares the folder."""
        if not self._lock(name).is_file():
            return False
        try:
            with FileLock(self._lock(name), timeout=0):
                return False
        except Timeout:
            return True

    def finished(self, name: str, config: dict[str, Any]) -> dict[str, Any] | None:
        """The finished trial; raises ConfigError if it was run by another config."""
        found = self.find(name)
        if found is not None:
            _check_same(self._place(name), _with_scale(found), config)
        return found

    def _run(self, name: str, run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        work = self.folder / "work" / name
        logger.info("%s", name)
        result = without_secrets(finite(run(work)))
        seed = int(result["config"]["training"].get("seed", 0))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = {"format": 1, "name": name, "provenance": provenance(seed, device), **result}
        result["config"] = _comparable(result["config"])
        write_whole(self.file(name), as_line(result))
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
    """A config without where it was run, secrets, and what a study does not show."""
    config = without_secrets(config)
    kept = {**_without(config, "forgetting"), "training": _without(config["training"], "output_dir")}
    return {**kept, "task": _without(config["task"], "samples")} if "task" in config else kept


def _without(section: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != key}


def _with_scale(found: dict[str, Any]) -> dict[str, Any]:
    """The config of a trial. smoa 0.1 knew only the paper's scale, and its trials do not name it."""
    config: dict[str, Any] = found["config"]
    adapter = config.get("adapter", {})
    version = found.get("provenance", {}).get("versions", {}).get("smoa") or ""
    by_weight = config.get("method") == "smoa" and adapter.get("modulation") != "none"
    if version.startswith("0.1.") and by_weight and not {"scale", "normalize_anchor"} & adapter.keys():
        return {**config, "adapter": {**adapter, "scale": "paper"}}
    return config


def _check_same(place: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    found, wanted = _comparable(found), _comparable(wanted)
    if "elsewhere" not in found:  # not recorded before smoa 0.2
        wanted.pop("elsewhere", None)
    if found == wanted:
        return
    keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    raise ConfigError(
        f"{place}: was run with other values of {', '.join(keys)}; give the changed one another folder (folder of a "
        "study, training.output_dir of a run), or move this file or line away to run it again"
    )
