"""What a run's folder tells, whole, unfinished, damaged or of an older version, and what is missing of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from smoa.errors import ConfigError, SmoaError
from smoa_lab.basics.without_secrets import without_secrets
from smoa_lab.config.yaml_text import parse_yaml, to_yaml
from smoa_lab.training.run_folder import RunFolder

AGAIN = "smoa eval scores the adapter again."


@dataclass(frozen=True)
class RunRecord:
    """A run: its metrics as far as they are known, its config as text, and a sentence for each file that is missing or
    damaged. ``whole`` is whether the metrics are those of a finished run."""

    folder: RunFolder
    metrics: dict[str, Any]
    config: str
    missing: list[str]
    whole: bool

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def method(self) -> str:
        """The method's name; empty if it is not known."""
        try:
            return str(parse_yaml(self.config, self.folder.config).get("method", "smoa"))
        except (SmoaError, AttributeError):
            return ""


def read_run(place: str | Path) -> RunRecord:
    """The record of the run in the folder ``place``.

    Raises:
        ConfigError: the folder has neither metrics nor a config.
    """
    folder = RunFolder(Path(place))
    if not folder.metrics.is_file() and not folder.config.is_file():
        raise ConfigError(f"{place}: is not the folder of a run: contains neither metrics.json nor config.yaml")
    metrics, problem = _metrics(folder)
    config, lack = _config(folder, metrics)
    return RunRecord(folder, metrics, config, [one for one in (problem, lack) if one], whole=problem is None)


def _config(folder: RunFolder, metrics: dict[str, Any]) -> tuple[str, str | None]:
    """The config's text, or that of the metrics and what is wrong with the file."""
    kept = to_yaml(metrics["config"]) if isinstance(metrics.get("config"), dict) else ""
    instead = " What is shown of it is from metrics.json." if kept else ""
    if not folder.config.is_file():
        return kept, f"config.yaml is missing.{instead}"
    try:
        shown = without_secrets(parse_yaml(folder.config.read_text(encoding="utf-8"), folder.config))
    except ValueError as error:  # neither UTF-8 nor YAML
        return kept, f"config.yaml is damaged: {error}.{instead}"
    return to_yaml(shown), None


def _metrics(folder: RunFolder) -> tuple[dict[str, Any], str | None]:
    """The metrics, or what the last checkpoint logged and what is wrong with the metrics."""
    try:
        found = json.loads(folder.metrics.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _logged(
            folder
        ), "The run is not finished: metrics.json is missing. Run the same smoa train again to go on with it."
    except ValueError as error:
        return _logged(folder), f"metrics.json is damaged: {error}. {AGAIN}"
    if not isinstance(found, dict):
        return _logged(folder), f"metrics.json is damaged: it is a {type(found).__name__}, not an object. {AGAIN}"
    return without_secrets(found), None


def _logged(folder: RunFolder) -> dict[str, Any]:
    checkpoint = get_last_checkpoint(str(folder.path))
    try:
        state = json.loads(Path(checkpoint or folder.path, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return {"history": state["log_history"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
