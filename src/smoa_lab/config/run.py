"""The config of a run: its blocks, and reading it from a YAML file.

``data`` says where rows come from: ``tasks`` names sets of questions, ``train`` or ``hub`` a user's own rows.
``adapter`` goes to the method's PEFT config and ``training`` to the trainer's arguments, whose keys and types are
checked as well.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, model_serializer, model_validator
from transformers import TrainingArguments

from smoa.errors import ConfigError
from smoa_lab.basics.section import Section, Seed
from smoa_lab.config.methods import MethodName
from smoa_lab.config.validation import Problem, all_problems
from smoa_lab.config.yaml_text import apply_overrides, key_lines, parse_yaml, to_yaml
from smoa_lab.data.files import HubRows
from smoa_lab.data.formats import Format
from smoa_lab.data.general_text import STORY
from smoa_lab.data.rows import AnswerStyle, Template
from smoa_lab.data.tasks import FileTask, Selection, Task, find_task, select

TRUST = ("trust_remote_code", "allow_all_kernels")
"""Keys of ``from_pretrained`` that let a repository run its own code."""
SECRET = re.compile(r"(hub_|.*access_)?token|(.*_)?api_key|password")
"""Keys, of transformers and of packages that it calls, whose text is a secret."""
TRAINING_DEFAULTS: dict[str, Any] = {"report_to": "none", "logging_steps": 10, "save_total_limit": 1}
ROWS_DEFAULTS: dict[str, Any] = {"bf16": False, "assistant_only_loss": True}
"""More of them for a user's own rows. Precision is what ``model.dtype`` says; the loss is on the assistant's turns."""
DECIDED = {
    "chat_template_path": "name the template as data.chat_template",
    "dataset_kwargs": "rows are prepared here",
    "dataset_text_field": "name the column text",
    "model_init_kwargs": "give them as model.options",
    "eos_token": "set it in the model's tokenizer",
    "truncation_mode": "rows keep their beginning",
}
"""Keys of TRL that would contradict the tokens that are made here, and what to do instead."""
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
    options: dict[str, Any] = Field(default={})


class DataSection(Section):
    """Which questions: ``tasks`` by name, of the table or of ``files``, which maps names to a user's own files.

    ``train_examples`` and ``validation_examples`` are totals over all tasks, drawn at random; ``test_examples`` counts
    per task. Without a number, all are used.
    """

    tasks: list[str] = Field(min_length=1)
    files: dict[str, FileTask] = Field(default={})
    train_examples: int | None = Field(default=None, gt=0)
    validation_examples: int | None = Field(default=None, ge=0)
    test_examples: int | None = Field(default=None, ge=0)
    validation_part: float = Field(default=0.05, ge=0.0, lt=1.0)
    seed: int = 0

    def chosen(self) -> dict[str, Task]:
        """The tasks by name."""
        return {name: find_task(name, self.files) for name in self.tasks}

    def select(self) -> Selection:
        """The questions of the run; raises DataError if they cannot be loaded."""
        sizes = {"train": self.train_examples, "validation": self.validation_examples, "test": self.test_examples}
        return select(self.chosen(), sizes, self.validation_part, self.seed)


class RowsSection(Section):
    """A user's own rows: ``train``, a file or a folder of files, or ``hub``, a data set of the Hub.

    ``format`` is recognized by the columns if left out. ``test`` is a second file or folder; without it ``test_part``
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


def _kind_of_data(data: Any) -> str:
    """``rows`` where ``train`` or ``hub`` is named, and no task."""
    if isinstance(data, dict):
        return "rows" if "tasks" not in data and data.keys() & {"train", "hub"} else "tasks"
    return "rows" if isinstance(data, RowsSection) else "tasks"


class RunConfig(Section):
    """A run: which model is trained on which rows, and how.

    ``early_stopping`` ends it when the validation loss has not fallen for so many evaluations, and keeps the best
    adapter. ``task`` is for questions, that is, for ``data.tasks``.
    """

    model: ModelSection
    method: MethodName = "smoa"
    adapter: dict[str, Any] = Field(default={})
    forgetting: ForgettingSection = ForgettingSection()
    training: dict[str, Any]
    data: Annotated[DataSection, Tag("tasks")] | Annotated[RowsSection, Tag("rows")] = Field(
        discriminator=Discriminator(_kind_of_data)
    )
    task: TaskSection = TaskSection()
    early_stopping: int | None = Field(default=None, gt=0)

    @model_serializer(mode="wrap")
    def _plain(self, serialize: Any) -> dict[str, Any]:
        """Without ``task`` where there are no questions, nor an early stopping that questions seldom have."""
        values: dict[str, Any] = serialize(self)
        unused = "task" if self.has_rows else "early_stopping" if self.early_stopping is None else None
        return {key: value for key, value in values.items() if key != unused}

    @property
    def has_rows(self) -> bool:
        """Whether it is on a user's own rows, not on questions."""
        return isinstance(self.data, RowsSection)

    @property
    def questions(self) -> DataSection:
        """The block ``data`` of a run on questions; raises ConfigError for one on rows."""
        if isinstance(self.data, RowsSection):
            raise ConfigError("data: names rows (data.train or data.hub); this takes questions (data.tasks)")
        return self.data

    @property
    def rows(self) -> RowsSection:
        """The block ``data`` of a run on a user's own rows; raises ConfigError for one on questions."""
        if isinstance(self.data, DataSection):
            raise ConfigError("data: names questions (data.tasks); this takes rows (data.train or data.hub)")
        return self.data

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.training["output_dir"])

    @property
    def validates(self) -> bool:
        """Whether a validation part is needed while training."""
        return str(self.training.get("eval_strategy", "no")) != "no"

    def to_yaml(self) -> str:
        """The resolved config: every default of ours filled in."""
        return to_yaml(self.model_dump(mode="json"))

    def arguments(self, format: str | None = None) -> TrainingArguments:
        """What the trainer takes: TRL's DPOConfig for rows of the format ``preference``, its SFTConfig for all others,
        told that rows come as tokens that are cut and labeled. Where a run on questions names no value,
        transformers' own default holds, not TRL's.

        Raises:
            ConfigError: a key is for another trainer, or would contradict the tokens.
        """
        target, training = _trainer_class({}, format == "preference"), dict(self.training)
        if self.has_rows:
            for key in DECIDED.keys() & training.keys():
                raise ConfigError(f"training.{key}: is not for rows: {DECIDED[key]}; leave it out")
            foreign = sorted(training.keys() - _keys(target) - ROWS_DEFAULTS.keys())
            if foreign:
                raise ConfigError(
                    f"training: {', '.join(foreign)} is not for {target.__name__}, which trains rows of the format "
                    f"{format}; leave it out"
                )
            training = {key: value for key, value in training.items() if key in _keys(target)}
        else:
            own = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
            training = {key: own[key] for key in ("bf16", "gradient_checkpointing", "learning_rate")} | training
        if self.early_stopping is not None:  # otherwise a resumed run would forget for how long it had waited
            training["restore_callback_states_from_checkpoint"] = True
        if format != "preference":
            training |= {"assistant_only_loss": False, "completion_only_loss": None}
            training |= {} if training.get("packing") else {"max_length": None}
        try:
            return target(**training)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"training: {error}") from error


@dataclass(frozen=True)
class ConfigText:
    """A config's plain values, where they are from, and the line of each key path.

    Raises:
        ConfigError: it holds a secret, or lets a repository run its own code, which only the command may.
    """

    values: dict[str, Any]
    place: str = "config"
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refuse(_forbidden(self.values))

    @classmethod
    def read(cls, path: str | Path, overrides: list[str] | None = None) -> ConfigText:
        """Read a YAML file and lay ``key.key=value`` overrides over it.

        Raises:
            ConfigError: the file cannot be read, or has a key that no config may have.
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
        return cls(values, str(file), key_lines(text))

    def checked(self) -> RunConfig:
        """The run, its training block laid over our defaults; raises ConfigError with all problems."""
        values, training = self.values, self.values.get("training")
        blocks: list[Any] = [values.get(name) for name in ("training", "data")]
        given, data = (block if isinstance(block, dict) else {} for block in blocks)
        target: type[TrainingArguments] = TrainingArguments
        defaults = {**TRAINING_DEFAULTS, "output_dir": f"runs/{Path(self.place).stem}"}
        if _kind_of_data(data) == "rows":
            target = _trainer_class(given, data.get("format") == "preference")
            defaults |= {key: value for key, value in ROWS_DEFAULTS.items() if key in _keys(target)}
            if values.get("task") is not None:
                self.refuse([(("task",), "is for questions (data.tasks); leave it out")])
            values = {key: value for key, value in values.items() if key != "task"}
        if values.get("early_stopping") is not None:
            defaults |= self._stopping(given)
        if training is None or isinstance(training, dict):
            values = {**values, "training": {**defaults, **(training or {})}}
        self.refuse(all_problems(RunConfig, values, target))
        return RunConfig.model_validate(values)

    def _stopping(self, training: dict[str, Any]) -> dict[str, Any]:
        """Defaults with early stopping: a checkpoint after each evaluation, of which the best is loaded at the end."""
        if str(training.get("eval_strategy", "no")) == "no":
            raise ConfigError(
                f"{self.place}: early_stopping: needs the loss on validation rows; set training.eval_strategy to epoch "
                "or steps, or leave early_stopping out"
            )
        steps = training.get("eval_steps") or training.get("logging_steps", TRAINING_DEFAULTS["logging_steps"])
        often = {"eval_steps": steps, "save_steps": steps} if str(training["eval_strategy"]) == "steps" else {}
        return {"load_best_model_at_end": True, "save_strategy": training["eval_strategy"], **often}

    def refuse(self, problems: Iterable[Problem]) -> None:
        """Raise ConfigError with all problems, by their lines, if there are any."""
        texts = []
        for path, reason in problems:
            known = (path[:length] for length in range(len(path), 0, -1))
            line = next((self.lines[place] for place in known if place in self.lines), 0)  # of the block around it
            text = f"{'.'.join(path)}: {reason}" if path else reason
            texts.append((line, f"line {line}: {text}" if line else text))
        if texts:
            title = f"{self.place}: {len(texts)} problem{'s' if len(texts) > 1 else ''}"
            raise ConfigError("\n  ".join([title, *(text for _, text in sorted(texts))]))


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read ``path``, apply ``key.key=value`` overrides and check everything.

    Raises:
        ConfigError: lists *all* problems, each with its line and the nearest valid key or value.
    """
    return ConfigText.read(path, overrides).checked()


def check_config(values: dict[str, Any], place: str = "config") -> RunConfig:
    """The checked config of plain values, as :func:`load_config` makes it."""
    return ConfigText(values, place).checked()


def _trainer_class(training: dict[str, Any], prefers: bool) -> type[TrainingArguments]:
    """TRL's DPOConfig for preferences, or where a key is only its; else SFTConfig."""
    import trl  # here, since it takes seconds

    only_dpo = _keys(trl.DPOConfig) - _keys(trl.SFTConfig)
    chosen: type[TrainingArguments] = trl.DPOConfig if prefers or training.keys() & only_dpo else trl.SFTConfig
    return chosen


def _keys(target: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(target)}


def _forbidden(values: Any, path: tuple[str, ...] = ()) -> Iterator[Problem]:
    """The keys that no config may have: those of :data:`TRUST` and of :data:`SECRET`."""
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        place = (*path, str(key))
        if key in TRUST and value not in (False, None):
            yield place, "a file can't allow a repository to run its code; if you trust it, give --trust-remote-code"
        if isinstance(value, str) and SECRET.fullmatch(str(key)):
            yield place, "a config can't hold a secret; leave it out, and set HF_TOKEN or log in instead"
        yield from _forbidden(value, place)
