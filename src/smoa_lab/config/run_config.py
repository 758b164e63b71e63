"""The YAML of a run.

Only ``model``, ``method``, ``data`` and ``task`` are ours: ``training`` goes to transformers' TrainingArguments and
``adapter`` to the method's PEFT config, whose keys and types are checked as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from smoa.errors import ConfigError
from smoa_lab.config.validation import all_problems
from smoa_lab.config.yaml_text import apply_overrides, key_lines, parse_yaml
from smoa_lab.data.files import FileTask
from smoa_lab.data.prompts import AnswerStyle, Template
from smoa_lab.data.selection import Selection, Sizes, select
from smoa_lab.data.tasks import Source, find_task

TRAINING_DEFAULTS: dict[str, Any] = {"report_to": "none", "logging_steps": 10, "save_total_limit": 1}


class Section(BaseModel):
    """A block of the config: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """``name``: hub id, folder, ``.gguf`` file or ``gemma3-270m``; ``options`` pass through to ``from_pretrained``."""

    name: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    options: dict[str, Any] = {}


class DataSection(Section):
    """Which questions: tasks of the table, and files of one's own, which are tasks by the name given to them.

    Of the training and validation part a shuffled sample of the given total is taken, of the test part one per task;
    without a number, all.
    """

    tasks: list[str] = Field(min_length=1)
    source: Source = "packaged"
    files: dict[str, FileTask] = {}
    train_examples: int | None = Field(default=None, gt=0)
    validation_examples: int | None = Field(default=None, ge=0)
    test_examples: int | None = Field(default=None, ge=0)
    validation_part: float = Field(default=0.05, ge=0.0, lt=1.0)
    seed: int = 0

    def select(self) -> Selection:
        """The records of the run; raises DataError where they cannot be had."""
        tasks = {name: find_task(name, self.source, self.files) for name in self.tasks}
        sizes = Sizes(self.train_examples, self.validation_examples, self.test_examples)
        return select(tasks, sizes, self.validation_part, self.seed)


class TaskSection(Section):
    """How questions are put and answers scored; ``baseline`` scores the untouched model too."""

    template: Template = "alpaca"
    answer: AnswerStyle = "text"
    max_length: int = Field(default=256, ge=8)
    eval_batch_tokens: int = Field(default=4096, ge=8)
    baseline: bool = True


class RunConfig(Section):
    """A whole run."""

    model: ModelSection
    method: str = "smoa"
    adapter: dict[str, Any] = {}
    data: DataSection
    task: TaskSection = TaskSection()
    training: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.training["output_dir"])

    def to_yaml(self) -> str:
        """The resolved config: every default of ours filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read ``path``, apply ``key.key=value`` overrides and check everything.

    Raises:
        ConfigError: lists *all* problems, each with its line and the nearest valid key or value.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such file")
    text = file.read_text(encoding="utf-8")
    values = parse_yaml(text, file)
    apply_overrides(values, overrides or [])
    return check_config(values, place=str(file), lines=key_lines(text))


def check_config(
    values: dict[str, Any], place: str = "config", lines: dict[tuple[str, ...], int] | None = None
) -> RunConfig:
    """The checked RunConfig of plain values, as :func:`load_config` makes it; ``lines`` maps key paths to lines."""
    training = values.get("training")
    if training is None or isinstance(training, dict):
        default_folder = {"output_dir": f"runs/{Path(place).stem}"}
        values = {**values, "training": {**TRAINING_DEFAULTS, **default_folder, **(training or {})}}
    problems = all_problems(RunConfig, values)
    if not problems:
        return RunConfig.model_validate(values)
    placed = sorted((_line(problem.path, lines or {}), problem.text) for problem in problems)
    listed = "\n".join(f"  {f'line {line}: ' if line else ''}{text}" for line, text in placed)
    raise ConfigError(f"{place}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{listed}")


def _line(path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> int:
    """The line of a key, or of the nearest key around it that the file has; 0 where it has none."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 0)
