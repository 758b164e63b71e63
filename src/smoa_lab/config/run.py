"""The config of a run: its blocks, and reading it from a YAML file.

``adapter`` goes to the method's PEFT config and ``training`` to the trainer's arguments, whose keys and types are
checked as well.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from pydantic import Field, field_validator, model_validator
from transformers import TrainingArguments

from smoa.errors import ConfigError
from smoa_lab.basics.settings import Section
from smoa_lab.basics.values import portable
from smoa_lab.config.methods import MethodName, find_method, trains_own_dtype
from smoa_lab.config.validation import block_problems, converted, method_problems, model_of, refuse
from smoa_lab.config.yaml_text import read_yaml, to_yaml
from smoa_lab.data.answers import OWN, MetricName
from smoa_lab.data.formats import Format
from smoa_lab.data.general_text import STORY
from smoa_lab.data.prepared import Group, Sizes
from smoa_lab.data.sources import HubRows, HubSource, RowSource, find_sources

TRUST = ("trust_remote_code", "allow_all_kernels")
"""Keys of ``from_pretrained`` that let a repository run its own code."""
TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "logging_steps": 10,
    "save_total_limit": 1,
    "bf16": False,
    "gradient_checkpointing": False,
}
"""Precision is what ``model.dtype`` says."""
OF_DATA = {"chat_template_path": "template", "max_length": "max_length"}
"""Keys of TRL by which tokens are made, and what they are called under ``data``."""
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

    ``dtype`` is by default what the machine multiplies fastest, see :func:`native_dtype`; where weights of the base or
    copies of them are trained float32, with ``training.bf16`` where that is bfloat16.
    ``options`` pass through to ``AutoModelForCausalLM.from_pretrained`` (``device_map``, ``quantization_config``, …).
    The latter may be a plain dictionary: ``{"load_in_4bit": True}``.
    """

    name: str
    dtype: Dtype = Field(default_factory=native_dtype)
    options: dict[str, Any] = Field(default={})

    @field_validator("options")
    @classmethod
    def _runs_no_code(cls, options: dict[str, Any]) -> dict[str, Any]:
        if given := [key for key in TRUST if options.get(key)]:
            raise ValueError(f"{given[0]}: a file can't let a repository run its code; give --trust-remote-code")
        return options


class DataSection(Section):
    """The rows. ``train`` is a file, a folder, a data set of the Hub or a named set such as ``csqa``, or a list of
    them; ``hub`` is a data set of which more is said than its name.

    ``format`` is recognized by the columns if left out. ``test`` are the rows that are tested, and no others are;
    without it, and where rows don't name their ``part``, a fifth of them is. ``template`` replaces the model's chat
    template: ``alpaca``, a name that TRL has, or a ``.jinja`` file. Rows are cut at ``max_length`` tokens. The numbers
    of examples are the most that are used, ``samples`` counts the held-out prompts that the model answers, and
    ``metric`` scores its answers to all. Rows of one value of the column ``group``, by default those of one prompt,
    stay in one part and are no independent ones; ``false`` takes each row by itself. An answer has at most
    ``answer_tokens``, by default a quarter more than the longest references but one in a hundred. With ``recall`` all
    rows are in each part: what is measured is what was learned by heart.
    """

    train: str | list[str] | None = None
    hub: HubRows | None = None
    test: str | list[str] | None = None
    format: Format | None = None
    template: str | None = None
    max_length: int | None = Field(default=1024, ge=8)
    skip_bad_rows: bool = False
    train_examples: int | None = Field(default=None, gt=0)
    validation_examples: int = Field(default=Sizes.validation, ge=0)
    test_examples: int = Field(default=Sizes.test, ge=0)
    samples: int = Field(default=10, ge=0)
    metric: MetricName | None = None
    group: Group = None
    answer_tokens: int | None = Field(default=None, gt=0)
    recall: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if bool(self.train) == (self.hub is not None):
            raise ValueError("give either train, a file, a folder or a name, or hub, a data set of the Hub")
        if self.recall and (self.test or (self.hub and self.hub.test_split)):
            raise ValueError("recall scores the rows that are trained on; leave test out")
        return self

    @property
    def source(self) -> str:
        """What the rows are called, without the folders of this machine."""
        return self.hub.name if self.hub else ", ".join(portable(_listed(self.train)))

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.train_examples, self.validation_examples, self.test_examples)

    def sources(self) -> tuple[list[RowSource], list[RowSource]]:
        """Where rows to train on are from, and those that are held out."""
        given = [find_sources(place)[0] for place in _listed(self.test)]
        if self.hub is not None:
            test: list[RowSource] = [HubSource(self.hub, self.hub.test_split)] if self.hub.test_split else []
            return [HubSource(self.hub, self.hub.split)], given or test
        found = [find_sources(place) for place in _listed(self.train)]
        return [train for train, _ in found], given or [test for _, test in found if test is not None]


def _listed(places: str | list[str] | None) -> list[str]:
    return [places] if isinstance(places, str) else places or []


class ScoringSection(Section):
    """Which held-out ``part`` is scored, and whether ``before`` training too."""

    part: Literal["test", "validation"] = "test"
    before: bool = True


class ForgettingSection(Section):
    """How forgetting is measured: on which ``text`` (``packaged``, or a text file), and on how many ``tokens`` of it, 0
    for none."""

    text: str = STORY
    tokens: int = Field(default=2048, ge=0)


class RunConfig(Section):
    """A run: which model is trained on which rows, and how.

    ``trainer`` is TRL's SFTTrainer; preferences are for its DPOTrainer, with SmoaConfig. ``early_stopping`` ends the
    run when the validation loss has not fallen for so many evaluations, and keeps the best adapter.
    """

    model: ModelSection
    method: MethodName = "smoa"
    adapter: dict[str, Any] = Field(default={})
    trainer: Literal["sft"] = "sft"
    data: DataSection
    training: dict[str, Any]
    early_stopping: int | None = Field(default=None, gt=0)
    scoring: ScoringSection = ScoringSection()
    forgetting: ForgettingSection = ForgettingSection()

    @field_validator("training")
    @classmethod
    def _at_home(cls, training: dict[str, Any]) -> dict[str, Any]:
        place = training.get("output_dir")
        return {**training, "output_dir": os.path.expanduser(place)} if isinstance(place, str) else training  # noqa: PTH111

    @property
    def folder(self) -> Path:
        return Path(self.training["output_dir"])

    def to_yaml(self) -> str:
        """The resolved config: every default of ours filled in, without a metric that only the command names."""
        values = self.model_dump(mode="json")
        return to_yaml({**values, "data": {**values["data"], **({"metric": None} if self.data.metric == OWN else {})}})

    def peft_config(self) -> PeftConfig | None:
        """The adapter's; None where the whole model is trained."""
        return find_method(self.method).peft_config(self.adapter)

    def arguments(self) -> TrainingArguments:
        """What TRL's trainer takes; its SFTTrainer is told that rows come as tokens that are cut and labeled."""
        training = {"logging_nan_inf_filter": False, **self.training}  # else the loss of a run that diverges is 0
        if self.early_stopping is not None:  # otherwise a resumed run would forget for how long it had waited
            training["restore_callback_states_from_checkpoint"] = True
        training |= {"assistant_only_loss": False, "completion_only_loss": None}
        length = self.data.max_length if training.get("packing") else None
        try:
            return trainer_arguments()(**training, max_length=length)  # type: ignore[call-arg]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"training: {error}") from error


def trainer_arguments() -> type[TrainingArguments]:
    """TRL's class of its trainer's arguments."""
    import trl  # here, since it takes seconds

    chosen: type[TrainingArguments] = trl.SFTConfig
    return chosen


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read ``path``, apply ``key.key=value`` overrides and check everything; a ConfigError lists *all* problems, each
    with its key and the nearest valid key or value."""
    return check_config(read_yaml(path, overrides or []), str(path))


def check_config(values: dict[str, Any], place: str = "config") -> RunConfig:
    """The checked config of plain values from a place: their training block is laid over our defaults."""
    given = values.get("training")
    training: dict[str, Any] = given if isinstance(given, dict) else {}
    defaults = {**TRAINING_DEFAULTS, "output_dir": f"runs/{Path(place).stem}"}
    if values.get("early_stopping") is not None:
        defaults |= _stopping(training, place)
    model, is_fast = values.get("model"), native_dtype() == "bfloat16"
    if isinstance(model, dict) and "dtype" not in model and is_fast and trains_own_dtype(values):
        # in 16 bits most steps would round away
        values = {**values, "model": {**model, "dtype": "float32"}}
        defaults |= {"bf16": True} | ({} if torch.accelerator.is_available() else {"use_cpu": True})
    if given is None or isinstance(given, dict):
        values = {**values, "training": {**defaults, **training}}
    problems = [*block_problems(RunConfig, values), *method_problems(values)]
    arguments: Any = trainer_arguments()
    if isinstance(block := values.get("training"), dict):
        problems += block_problems(model_of(arguments), block, ("training",))
        problems += [(("training", key), f"name it as data.{OF_DATA[key]}") for key in OF_DATA.keys() & block]
    refuse(place, problems)
    method = find_method(str(values.get("method", "smoa"))).config_class
    for name, target in (("adapter", method), ("training", arguments)):
        if target is not None and name in values:
            values = {**values, name: converted(target, values[name])}
    config = RunConfig.model_validate(values)
    config.arguments()  # which raises what TRL and transformers refuse
    return config


def _stopping(training: dict[str, Any], place: str) -> dict[str, Any]:
    """Defaults with early stopping: a checkpoint after each evaluation, of which the best is loaded at the end."""
    if str(training.get("eval_strategy", "no")) == "no":
        rule = "needs the loss on validation rows; set training.eval_strategy to epoch or steps"
        raise ConfigError(f"{place}: early_stopping: {rule}, or leave it out")
    steps = training.get("eval_steps") or training.get("logging_steps", TRAINING_DEFAULTS["logging_steps"])
    often = {"eval_steps": steps, "save_steps": steps} if str(training["eval_strategy"]) == "steps" else {}
    return {"load_best_model_at_end": True, "save_strategy": training["eval_strategy"], **often}
