"""Trials: one JSON per finished run, named after what was run, never overwritten."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from smoa.atomic import write_whole
from smoa.errors import ConfigError
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

    def find(self, name: str) -> dict[str, Any] | None:
        """A finished trial's JSON."""
        file = self.file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def get(self, name: str, config: dict[str, Any], run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The finished trial, or else ``run(work folder)``, stored.

        Raises:
            ConfigError: a trial of that name was run by another config.
        """
        found = self.find(name)
        if found is not None:
            _check_same(self.file(name), found["config"], config)
            return found
        work = self.folder / "work" / name
        logger.info("%s", name)
        result = finite(run(work))
        seed = int(result["config"]["training"].get("seed", 0))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = {"format": 1, "name": name, "provenance": provenance(seed, device), **result}
        result["config"] = _comparable(result["config"])
        write_whole(
            self.file(name), json.dumps(result, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        )
        shutil.rmtree(work, ignore_errors=True)
        return result


def finite(value: Any) -> Any:
    """The same, with None for NaN and infinities, which JSON has no words for: what a run left that diverged."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without where it was run."""
    return {**config, "training": {key: value for key, value in config["training"].items() if key != "output_dir"}}


def _check_same(file: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = _comparable(wanted)
    if found == wanted:
        return
    keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    raise ConfigError(
        f"{file}: was run with other values of {', '.join(keys)}; give the changed study another folder, "
        "or move this file away to run it again"
    )
