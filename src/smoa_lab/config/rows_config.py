"""The config of a run on a user's own rows: conversations, prompts with completions, plain text, or preferences.

Its ``training`` block goes to TRL's SFTConfig, or to its DPOConfig for preferences.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from transformers import TrainingArguments

from smoa.errors import ConfigError
from smoa_lab.basics.extras import import_package
from smoa_lab.basics.section import Section, Seed
from smoa_lab.config.run_config import TRAINING_DEFAULTS, ConfigText, Run, RunConfig
from smoa_lab.rows.formats import Format
from smoa_lab.rows.sources import HubRows

ROWS_DEFAULTS: dict[str, Any] = {"bf16": False, "assistant_only_loss": True}
"""Training arguments of runs on rows. Precision is what ``model.dtype`` says; the loss is on the assistant's turns."""
DECIDED = {
    "chat_template_path": "name the template as data.chat_template",
    "dataset_kwargs": "rows are prepared here",
    "dataset_text_field": "name the column text",
    "model_init_kwargs": "give them as model.options",
    "eos_token": "set it in the model's tokenizer",
    "truncation_mode": "rows keep their beginning",
}
"""Keys of the trainers that would contradict the tokens that are made here, and what to do instead."""


class RowsSection(Section):
    """A user's own rows: ``train``, a file or a folder of files, or ``hub``, a data set of the Hub.

    ``format`` is recognised by the columns if left out. ``test`` is a second file or folder; without it ``test_part``
    of the rows is held out, and ``validation_part`` where ``training.eval_strategy`` asks for it. ``chat_template``
    replaces the model's: ``alpaca``, a name that TRL has, or a ``.jinja`` file. ``samples`` counts the held-out prompts
    that the model answers before and after.
    """

    train: str | None = Field(default=None, min_length=1)
    test: str | None = Field(default=None, min_length=1)
    hub: HubRows | None = None
    format: Format | None = None
    chat_template: str | None = None
    skip_bad_rows: bool = False
    test_part: float = Field(default=0.05, ge=0.0, lt=1.0)
    validation_part: float = Field(default=0.05, ge=0.0, lt=1.0)
    train_examples: int | None = Field(default=None, gt=0)
    validation_examples: int = Field(default=200, ge=1)
    test_examples: int = Field(default=200, ge=0)
    samples: int = Field(default=10, ge=0)
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_source(self) -> RowsSection:
        if (self.train is None) == (self.hub is None):
            raise ValueError("give either train, a file or a folder, or hub, a data set of the Hub")
        return self


class RowsConfig(Run):
    """A run on rows. ``early_stopping`` ends it when the validation loss has not fallen for so many evaluations, and
    keeps the best adapter."""

    data: RowsSection
    early_stopping: int | None = Field(default=None, gt=0)


def load_any_config(
    path: str | Path, overrides: list[str] | None = None, trust_remote_code: bool = False
) -> RunConfig | RowsConfig:
    """The config of a run on questions or on rows: ``data.train`` or ``data.hub`` decides.

    Raises:
        ConfigError: lists *all* problems, each with its line and the nearest valid key or value.
    """
    return _checked_any(ConfigText.read(path, overrides, trust_remote_code))


def check_any_config(values: dict[str, Any]) -> RunConfig | RowsConfig:
    """The checked config of plain values, as :func:`load_any_config` makes it."""
    return _checked_any(ConfigText(values))


def check_rows_config(values: dict[str, Any], place: str = "config") -> RowsConfig:
    """The checked config of plain values, which must be those of a run on rows."""
    return _checked(ConfigText(values, place))


def _checked_any(text: ConfigText) -> RunConfig | RowsConfig:
    return _checked(text) if text.has_rows else text.questions()


def _checked(text: ConfigText) -> RowsConfig:
    import_package("trl", f"{text.place}: data.train")
    training, data = text.values.get("training"), text.values.get("data")
    prefers = isinstance(data, dict) and data.get("format") == "preference"
    training = training if isinstance(training, dict) else {}
    target = training_class(training, prefers)
    chosen = {key: value for key, value in ROWS_DEFAULTS.items() if key in _keys(target)}
    stopping = _stopping(text, training) if text.values.get("early_stopping") is not None else {}
    return text.checked(RowsConfig, target, {**chosen, **stopping})


def _stopping(text: ConfigText, training: dict[str, Any]) -> dict[str, Any]:
    """Defaults with early stopping: a checkpoint after each evaluation, of which the best is loaded at the end."""
    if str(training.get("eval_strategy", "no")) == "no":
        raise ConfigError(
            f"{text.place}: early_stopping: needs the loss on validation rows; set training.eval_strategy to epoch or "
            "steps, or leave early_stopping out"
        )
    steps = training.get("eval_steps") or training.get("logging_steps", TRAINING_DEFAULTS["logging_steps"])
    often = {"eval_steps": steps, "save_steps": steps} if str(training["eval_strategy"]) == "steps" else {}
    return {"load_best_model_at_end": True, "save_strategy": training["eval_strategy"], **often}


def training_class(training: dict[str, Any], prefers: bool) -> type[TrainingArguments]:
    """TRL's DPOConfig for preferences, or where a key is only its; else SFTConfig."""
    trl = import_package("trl", "data.train")
    DPOConfig, SFTConfig = trl.DPOConfig, trl.SFTConfig
    only_dpo = _keys(DPOConfig) - _keys(SFTConfig)
    chosen: type[TrainingArguments] = DPOConfig if prefers or training.keys() & only_dpo else SFTConfig
    return chosen


def check_training_keys(training: dict[str, Any], target: type[TrainingArguments], found: str) -> dict[str, Any]:
    """The keys for ``target``, ours aside; raises ConfigError if one belongs to another trainer, or to none here."""
    for key, remedy in DECIDED.items():
        if key in training:
            raise ConfigError(f"training.{key}: is not for rows: {remedy}; leave it out")
    foreign = sorted(training.keys() - _keys(target) - ROWS_DEFAULTS.keys())
    if foreign:
        raise ConfigError(
            f"training: {', '.join(foreign)} is not for {target.__name__}, which trains rows of the format {found}; "
            "leave it out"
        )
    return {key: value for key, value in training.items() if key in _keys(target)}


def _keys(target: type[Any]) -> set[str]:
    return {one.name for one in dataclasses.fields(target)}
