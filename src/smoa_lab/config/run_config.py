"""The config of a run: its blocks, and reading it from a YAML file.

Only ``model``, ``method``, ``data`` and ``task`` are ours: ``training`` goes to transformers' TrainingArguments and
``adapter`` to the method's PEFT config, whose keys and types are checked as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from transformers import TrainingArguments

from smoa.errors import ConfigError
from smoa_lab.basics.section import Section
from smoa_lab.basics.without_secrets import without_secrets
from smoa_lab.config.problems import Problem, listed
from smoa_lab.config.validation import all_problems
from smoa_lab.config.yaml_text import apply_overrides, key_lines, parse_yaml, to_yaml
from smoa_lab.data.files import FileTask
from smoa_lab.data.prompts import AnswerStyle, Template
from smoa_lab.data.selection import Selection, Sizes, select
from smoa_lab.data.sources.general_text import STORY
from smoa_lab.data.tasks import Source, Task, find_task

TRUST = ("trust_remote_code", "allow_all_kernels")
"""Keys, of ours and of ``from_pretrained``, that let a repository run its own code."""
TRAINING_DEFAULTS: dict[str, Any] = {"report_to": "none", "logging_steps": 10, "save_total_limit": 1}
Dtype = Literal["float32", "bfloat16", "float16"]
SMALL, LARGE = (3e8, 2e-3), (1e9, 2e-4)
"""Parameters of a base model, and where the search for an adapter's learning rate begins there. Up to 300M it was
measured; at 1B and above it is what is usual for LoRA."""


def adapter_rate(parameters: int) -> float:
    """The learning rate of an adapter on a model of so many parameters: the logarithms go in a line between
    :data:`SMALL` and :data:`LARGE`, and beyond them the rate stays as it is."""
    (small, high), (large, low) = SMALL, LARGE
    part = math.log(parameters / small) / math.log(large / small)
    return float(f"{high * (low / high) ** min(max(part, 0.0), 1.0):.1e}")


def native_dtype() -> Dtype:
    """bfloat16 where the GPU, or without one the CPU, multiplies it rather than imitating it; else float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if cpu_multiplies_bfloat16() else "float32"


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512, AMX or ARM instructions for it; an older torch does not list what a CPU has."""
    listed: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found and name.endswith("bf16") for name, found in listed.items())


class ModelSection(Section):
    """Which base model to load. ``name``: Hub id, folder, ``.gguf`` file, ``gemma3-270m`` or ``smollm2-135m``.

    ``dtype`` is by default what the machine multiplies fastest, see :func:`native_dtype`.
    ``options`` pass through to ``AutoModelForCausalLM.from_pretrained`` (``device_map``, ``quantization_config``, …).
    The latter may be a plain dictionary: ``{"load_in_4bit": True}``.
    """

    name: str
    dtype: Dtype = Field(default_factory=native_dtype)
    trust_remote_code: bool = False
    options: dict[str, Any] = Field(default={})


class DataSection(Section):
    """Which questions: ``tasks`` by name, of the table or of ``files``, which maps names to a user's own files.

    ``train_examples`` and ``validation_examples`` are totals over all tasks, drawn at random; ``test_examples`` counts
    per task. Without a number, all are used.
    """

    tasks: list[str] = Field(min_length=1)
    source: Source = "packaged"
    files: dict[str, FileTask] = Field(default={})
    train_examples: int | None = Field(default=None, gt=0)
    validation_examples: int | None = Field(default=None, ge=0)
    test_examples: int | None = Field(default=None, ge=0)
    validation_part: float = Field(default=0.05, ge=0.0, lt=1.0)
    seed: int = 0

    def chosen(self) -> dict[str, Task]:
        """The tasks by name."""
        return {name: find_task(name, self.source, self.files) for name in self.tasks}

    def select(self) -> Selection:
        """The records of the run; raises DataError if they cannot be loaded."""
        sizes = Sizes(self.train_examples, self.validation_examples, self.test_examples)
        return select(self.chosen(), sizes, self.validation_part, self.seed)


class TaskSection(Section):
    """How questions are put and answers scored; ``baseline`` scores the untouched model too. ``samples`` counts the
    held-out questions for which the model writes an answer, before and after."""

    template: Template = "alpaca"
    answer: AnswerStyle = "text"
    max_length: int = Field(default=256, ge=8)
    eval_batch_tokens: int = Field(default=4096, ge=8)
    baseline: bool = True
    samples: int = Field(default=3, ge=0)


class ForgettingSection(Section):
    """How forgetting is measured: on which ``text`` (``packaged``, ``finewiki`` from the Hub, or a text file), and on
    how many ``tokens`` of it, 0 for none."""

    text: str = STORY
    tokens: int = Field(default=2048, ge=0)


class Run(Section):
    """What every run has, whatever it learns from."""

    model: ModelSection
    method: str = "smoa"
    adapter: dict[str, Any] = Field(default={})
    forgetting: ForgettingSection = ForgettingSection()
    training: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.training["output_dir"])

    @property
    def validates(self) -> bool:
        """Whether a validation part is needed while training."""
        return str(self.training.get("eval_strategy", "no")) != "no"

    def to_yaml(self) -> str:
        """The resolved config: every default of ours filled in, and no secret."""
        return to_yaml(without_secrets(self.model_dump(mode="json")))


AnyRun = TypeVar("AnyRun", bound=Run)


class RunConfig(Run):
    """A run on questions with answers."""

    data: DataSection
    task: TaskSection = TaskSection()


@dataclass(frozen=True)
class ConfigText:
    """A config's plain values, where they are from, and the line of each key path."""

    values: dict[str, Any]
    place: str = "config"
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, overrides: list[str] | None = None, trust_remote_code: bool = False) -> ConfigText:
        """Read a YAML file and lay ``key.key=value`` overrides over it.

        Only ``trust_remote_code`` lets the model's repository run its own code: a file can come from a stranger.

        Raises:
            ConfigError: the file cannot be read, or asks for such trust.
        """
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"{path}: no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{path}: cannot be read as text in UTF-8 ({error}); save it in that encoding") from error
        values = parse_yaml(text, file)
        apply_overrides(values, overrides or [])
        found = cls(values, str(file), key_lines(text))
        run = values.get("shared", values)  # a study has its runs' config there
        if not trust_remote_code:
            found.refuse(_trusting(values))
        elif isinstance(run, dict) and isinstance(run.get("model"), dict):
            run["model"]["trust_remote_code"] = True
        return found

    @property
    def has_rows(self) -> bool:
        """Whether it is of a run on a user's own rows."""
        data = self.values.get("data")
        return isinstance(data, dict) and "tasks" not in data and bool(data.keys() & {"train", "hub"})

    def questions(self) -> RunConfig:
        """The checked run on questions."""
        return self.checked(RunConfig, TrainingArguments, {})

    def checked(self, target: type[AnyRun], training_class: type[Any], defaults: dict[str, Any]) -> AnyRun:
        """The run, its training block laid over ``defaults``; raises ConfigError with all problems."""
        values, training = self.values, self.values.get("training")
        if training is None or isinstance(training, dict):
            folder = {"output_dir": f"runs/{Path(self.place).stem}"}
            values = {**values, "training": {**TRAINING_DEFAULTS, **folder, **defaults, **(training or {})}}
        self.refuse(all_problems(target, values, training_class))
        return target.model_validate(values)

    def refuse(self, problems: Iterable[Problem]) -> None:
        """Raise ConfigError with all problems, by their lines, if there are any."""
        placed = sorted((_line(problem.path, self.lines), problem.text) for problem in problems)
        texts = [f"line {line}: {text}" if line else text for line, text in placed]
        if texts:
            raise ConfigError(f"{self.place}: {listed(texts)}")


def load_config(path: str | Path, overrides: list[str] | None = None, trust_remote_code: bool = False) -> RunConfig:
    """Read ``path``, apply ``key.key=value`` overrides and check everything.

    Raises:
        ConfigError: lists *all* problems, each with its line and the nearest valid key or value; or the run is on rows.
    """
    text = ConfigText.read(path, overrides, trust_remote_code)
    if text.has_rows:
        raise ConfigError(f"{path}: trains on rows (data.train or data.hub); this command takes questions (data.tasks)")
    return text.questions()


def check_config(values: dict[str, Any], place: str = "config") -> RunConfig:
    """The checked RunConfig of plain values, as :func:`load_config` makes it."""
    return ConfigText(values, place).questions()


def _trusting(values: Any, path: tuple[str, ...] = ()) -> Iterator[Problem]:
    """The keys that allow a repository to run its own code."""
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        place = (*path, str(key))
        if key in TRUST and value not in (False, None):
            text = "a file can't allow a repository to run its code; if you trust it, give --trust-remote-code"
            yield Problem(place, f"{'.'.join(place)}: {text}")
        yield from _trusting(value, place)


def _line(path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> int:
    """The line of a key, or of the nearest block around it that the file has; 0 if it has none."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 0)
