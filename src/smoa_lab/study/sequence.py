"""Studies of learning without forgetting: a first task is trained once, then each entry trains one or more others."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from peft import PeftModel
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.atomic import new_folder, write_whole
from smoa.errors import ConfigError
from smoa_lab.basics.extras import require
from smoa_lab.basics.section import Section, Seed
from smoa_lab.basics.without_secrets import without_secrets
from smoa_lab.config.run import DataSection, ModelSection, RunConfig, check_config, native_dtype
from smoa_lab.data.tasks import Selection
from smoa_lab.models.base_models import base_content, empty_model, load_base_model
from smoa_lab.models.needs import training_needs
from smoa_lab.scoring.evaluation import Outcome, answer_outcomes
from smoa_lab.scoring.forgetting import text_losses, whole_text
from smoa_lab.scoring.losses import Losses
from smoa_lab.study.changes import weight_changes
from smoa_lab.study.entry import Entry
from smoa_lab.study.runner import AnswerRunner, Part, scored, without_bar
from smoa_lab.training.adapting import check_adapter
from smoa_lab.training.loaded_run import LoadedRun, encoder_of, load_run
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]
MEASURED = ("data", "task", "first", "between", "elsewhere")
"""Parts of a stored config that decide what an earlier task's model is scored on."""


class Between(Section):
    """A task that every entry trains by its own method, rate and seed, between the first and the last one."""

    data: dict[str, Any]
    task: dict[str, Any] = Field(default={})
    training: dict[str, Any] = Field(default={})


class First(Between):
    """How the first task is trained. ``model``, ``task`` and ``training`` are laid over the shared blocks."""

    method: str = "full"
    adapter: dict[str, Any] = Field(default={})
    learning_rate: float = Field(gt=0)
    seed: Seed = 0
    model: dict[str, Any] = Field(default={})


class EarlierTask:
    """The trained task in ``room / KEY``, where KEY is a hash of ``config``: a changed one is trained anew.

    ``dtype`` is what the merged model is stored in. With ``previous`` it starts from that task's model, and is stored
    even if it diverged.
    """

    def __init__(
        self,
        config: RunConfig,
        room: Path,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        previous: EarlierTask | None = None,
    ) -> None:
        self.described = without_secrets(config.model_dump(mode="json"))
        self.described["training"].pop("output_dir")
        self.described["stored_as"] = dtype
        place = config.model
        if previous is not None:
            self.described["model"]["name"] = previous.folder.name
            place = place.model_copy(update={"name": previous.model.name})
        self.folder: Path = room / _key(self.described)
        training = {**config.training, "output_dir": str(self.folder / "run")}
        self.config = config.model_copy(update={"training": training, "model": place})
        self.model: ModelSection = ModelSection(name=str(self.folder / "model"), dtype=dtype)
        self.is_first = previous is None

    def scores(self, records: Selection, measure: Measure, measured: dict[str, Any]) -> dict[str, Any]:
        """What ``measure`` found of the stored model and, under ``start`` of the first task's, of the base model.

        Whatever is missing is made first: the model, then the scores, which are kept for the same ``measured``, what
        decides them. A second process waits meanwhile.

        Raises:
            ConfigError: the training diverged.
        """
        file = self.folder / f"scores-{_key(measured)}.json"
        if not file.is_file():
            self.store(records)
            with FileLock(self.folder / "lock"):
                if not file.is_file():
                    write_whole(file, json.dumps(self._measured(measure)) + "\n")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def store(self, records: Selection) -> None:
        """Train, merge and save, unless that was done. An interrupted training goes on from its last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            if not Path(self.model.name).is_dir():
                self._store_model(records, Path(self.model.name))

    def _store_model(self, records: Selection, target: Path) -> None:
        logger.info("Training an earlier task into %s", target)
        run = RunFolder(self.config.folder)
        inputs = {"data": records.content, "base model": base_content(self.config.model)}
        checkpoint = run.start(self.config.to_yaml(), inputs)
        loaded = load_run(self.config, records)
        model, _, _ = loaded.fit(without_bar(loaded.arguments()), checkpoint)
        merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
        if self.is_first and not all(bool(parameter.isfinite().all()) for parameter in merged.parameters()):
            raise ConfigError("first.learning_rate: the first task's training diverged; lower the rate")
        with new_folder(target) as temporary:
            merged.to(getattr(torch, self.model.dtype)).save_pretrained(temporary)
            loaded.tokenizer.save_pretrained(temporary)
        shutil.rmtree(run.path)

    def _measured(self, measure: Measure) -> dict[str, Any]:
        found = measure(*load_base_model(self.model))
        if self.is_first:
            found["start"] = measure(*load_base_model(self.config.model.model_copy(update={"dtype": self.model.dtype})))
        return found


def _key(described: dict[str, Any]) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


class SequenceRunner(AnswerRunner):
    """Trains the last task on the model of the earlier ones; scores all on their test parts, and the text elsewhere.

    With ``replay`` the last task is trained on that many training rows of the first one too.
    """

    def __init__(
        self,
        shared: dict[str, Any],
        elsewhere: DataSection | None,
        first: First,
        folder: Path,
        between: Sequence[Between] = (),
        replay: int = 0,
    ) -> None:
        super().__init__(shared, elsewhere)
        self.first = first
        self.folder = folder
        self.between = between
        self.replay = replay

    def first_config(self, place: str = "study") -> RunConfig:
        """The whole run of the first task; raises ConfigError with all problems of it."""
        own = self.first.model_dump(include={"data", "method", "adapter"})
        rate = {"learning_rate": self.first.learning_rate, "seed": self.first.seed}
        laid = {key: {**(self.shared.get(key) or {}), **getattr(self.first, key)} for key in ("model", "task")}
        training = {**(self.shared.get("training") or {}), **self.first.training, **rate}
        return check_config({**own, **laid, "training": training}, place)

    def between_configs(self, config: RunConfig, place: str = "study") -> list[RunConfig]:
        """The whole runs of the tasks between, by an entry's own config."""
        values = config.model_dump(mode="json")
        return [
            check_config(
                {
                    **values,
                    "data": one.data,
                    "task": {**(self.shared.get("task") or {}), **one.task},
                    "training": {**config.training, **one.training},
                },
                f"{place}.between[{number}]",
            )
            for number, one in enumerate(self.between)
        ]

    def stored_config(self, config: RunConfig) -> dict[str, Any]:
        """What a trial keeps of its config: also the earlier tasks, which decide where an entry starts."""
        between = {"between": [one.model_dump(mode="json") for one in self.between]} if self.between else {}
        replay = {"replay": self.replay} if self.replay else {}
        return {**super().stored_config(config), "first": self._first_task.described, **between, **replay}

    def check_needs(self, entry: Entry) -> None:
        """Check what the entry needs for the earlier tasks too."""
        super().check_needs(entry)
        first, config = self.first_config(), self.config(entry, entry.learning_rate, seed=0)
        for earlier in (first, *self.between_configs(config)):
            require(training_needs(earlier))
        check_adapter(empty_model(first.model), first.method, first.adapter)

    @cached_property
    def records(self) -> Selection:
        """The records of the last task, and among its training rows those that are replayed; read once."""
        last: Selection = super().records
        first = self.earlier_records[0]
        train = last.train + first.train[: self.replay]
        return replace(last, train=train, families={**first.families, **last.families})

    @cached_property
    def earlier_records(self) -> list[Selection]:
        """The records of the earlier tasks; read once."""
        named = {"first": self.first.data, **{f"between[{i}]": one.data for i, one in enumerate(self.between)}}
        found = {name: DataSection.model_validate(data).select() for name, data in named.items()}
        for name, records in found.items():
            if not records.test:
                raise ConfigError(f"{name}.data.test_examples: a study needs a test part; it has no questions")
        rows = len(found["first"].train)
        if self.replay > rows:
            raise ConfigError(f"replay: must be at most the {rows} training rows of first.data, got {self.replay}")
        return list(found.values())

    @cached_property
    def _first_task(self) -> EarlierTask:
        return EarlierTask(self.first_config(), self.folder / "work" / "first", self._dtype)

    @property
    def _dtype(self) -> Any:
        return self.shared["model"].get("dtype") or native_dtype()

    def _earlier_tasks(self, config: RunConfig) -> list[EarlierTask]:
        """The first one, and in the run's own folder those between."""
        found = [self._first_task]
        for between in self.between_configs(config):
            room = Path(config.training["output_dir"]) / "between"
            found.append(EarlierTask(between, room, self._dtype, found[-1]))
        return found

    def before(self, config: RunConfig, tasks: Sequence[EarlierTask]) -> dict[str, Any]:
        """Scores of the model of the last of these tasks; what was not trained is."""

        def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
            self.encoder = encoder_of(config, tokenizer)
            return self._measured(model, config)

        pairs = list(zip(tasks, self.earlier_records, strict=False))
        for task, records in pairs:
            task.store(records)
        task, records = pairs[-1]
        found = self.stored_config(config)
        return task.scores(records, measure, {key: found.get(key) for key in MEASURED})

    def _load(self, config: RunConfig) -> LoadedRun:
        tasks = self._earlier_tasks(config)
        self.before(config, tasks)
        place = {"name": tasks[-1].model.name}
        return super()._load(config.model_copy(update={"model": config.model.model_copy(update=place)}))

    def _scores(self, model: nn.Module | None, config: RunConfig, part: Part) -> dict[str, Any]:
        if model is None:
            return self.before(config, [self._first_task])
        before = self.before(config, self._earlier_tasks(config))
        after = self._measured(model, config)
        change = weight_changes(model, self._load(config).base)
        return {**after, "forgot": _forgot(before, after), "change": change}

    def _measured(self, model: nn.Module, config: RunConfig) -> dict[str, Any]:
        """Scores of the last task as in other studies, of all earlier tasks, and of the text elsewhere."""
        configs = [self.first_config(), *self.between_configs(config)]
        outcomes: list[Outcome] = []
        for earlier, records in zip(configs, self.earlier_records, strict=True):
            encoder = encoder_of(earlier, self.encoder.tokenizer)
            outcomes += answer_outcomes(model, encoder, records.test, earlier.task.eval_batch_tokens)
        first = {
            "sha256": " ".join(records.account["used"]["test"]["sha256"] for records in self.earlier_records),
            **scored(outcomes),
        }
        return {**super()._scores(model, config, "test"), "first": first}

    def _away(self, model: nn.Module | None, config: RunConfig) -> dict[str, Any]:
        """The loss on the records' whole texts, and that of each."""
        assert model is not None  # the untouched model is scored as the first task's
        found = text_losses(model, self.encoder.tokenizer, [whole_text(record) for record in self._elsewhere_records])
        return {"elsewhere": found.mean, "texts": asdict(found)}


def _forgot(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The rise of the loss on the first task and on the text elsewhere."""
    pairs = {"first": [one["first"]["questions"] for one in (before, after)]}
    if "texts" in before:
        pairs["elsewhere"] = [before["texts"], after["texts"]]
    losses = {name: [Losses(one["nll"], one["tokens"]) for one in pair] for name, pair in pairs.items()}
    return {name: asdict(late.change_from(early)) for name, (early, late) in losses.items()}
