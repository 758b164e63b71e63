"""A run on a user's own rows: TRL trains, and held-out rows give loss, perplexity and sample answers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from smoa.atomic import check_place
from smoa.errors import ConfigError, DataError
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.extras import import_package, require
from smoa_lab.basics.foreign import foreign_warnings_ignored
from smoa_lab.basics.positions import check_positions
from smoa_lab.config.methods import METHODS
from smoa_lab.config.rows_config import RowsConfig, RowsSection, check_training_keys, training_class
from smoa_lab.lessons.lesson import Lesson, check_validation, checked_arguments
from smoa_lab.lessons.row_looks import RowLooks
from smoa_lab.models.base_models import load_base_model
from smoa_lab.models.needs import rows_needs
from smoa_lab.rows.sources import FileSource, HubSource, Source
from smoa_lab.scoring.row_losses import Losses
from smoa_lab.tokens.account import require_good_rows
from smoa_lab.tokens.chat_templates import set_chat_template, stop_at_turns_end
from smoa_lab.tokens.encoding import RowEncoder
from smoa_lab.tokens.prepared import Part, PreparedRows, RowsWanted, Shares, prepare_rows

REFERENCE = "ref"
"""DPOTrainer's name of its copy of the untrained adapter, which it compares with."""


@dataclass(frozen=True)
class OwnRows(Lesson):
    """Rows on disk and the encoder that made their tokens."""

    config: RowsConfig
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: RowEncoder
    rows: PreparedRows

    @property
    def title(self) -> str:
        return self.source.name

    @property
    def source(self) -> Source:
        """Where the training rows are from."""
        return sources(self.config.data)[0]

    @property
    def prefers(self) -> bool:
        """Whether the rows are preferences."""
        return bool(self.rows.account["format"] == "preference")

    def arguments(self) -> TrainingArguments:
        check_validation(self.config, self.rows.account["parts"].get("validation", 0), "rows")
        self._check_head()
        prefers = self.prefers
        target = training_class({}, prefers)
        training = check_training_keys(self.config.training, target, self.rows.account["format"])
        if self.config.early_stopping is not None:  # else a resumed run would forget for how long it had waited
            training["restore_callback_states_from_checkpoint"] = True
        if not prefers:  # the tokens are cut already, and their labels say what is trained
            training |= {"assistant_only_loss": False, "completion_only_loss": None}
            training |= {} if training.get("packing") else {"max_length": None}
        try:
            with foreign_warnings_ignored():
                arguments = target(**training)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"training: {error}") from error
        return checked_arguments(arguments)

    def _check_head(self) -> None:
        """TRL computes the loss from the output layer's own weight, which PEFT's defaults for a model leave out."""
        wanted = METHODS[self.config.method].peft_config(self.config.adapter)
        if getattr(wanted, "target_modules", None) is None:
            return
        head = self.base.get_output_embeddings()
        name = next((name for name, module in self.base.named_modules() if module is head), None)
        if name is not None and check_target_module_exists(wanted, name):
            raise ConfigError(
                f"adapter.target_modules: names {name}, which TRL would not train; leave it out, or train on questions"
            )

    def looks(self, alone: bool) -> RowLooks:
        wanted = self.config.data
        held_out = self.rows.part("test", wanted.test_examples, wanted.seed)
        return RowLooks(held_out, self.encoder, self.rows.account["max_length"], wanted.samples * alone)

    def trainer(self, model: Any, arguments: Any, **options: Any) -> Trainer:
        trl = import_package("trl", "data.train")
        try:
            trainer: Trainer = (trl.DPOTrainer if self.prefers else trl.SFTTrainer)(
                model=model,
                args=arguments,
                train_dataset=self._part("train", self.config.data.train_examples),
                eval_dataset=self._part("validation", self.config.data.validation_examples),
                **options,
            )
        except ValueError as error:
            raise ConfigError(f"training: TRL refuses: {error}") from error
        vars(trainer)["create_model_card"] = lambda **_: None  # the adapter gets a card of ours
        if self.config.early_stopping is not None:
            trainer.add_callback(EarlyStoppingCallback(self.config.early_stopping))
        return trainer

    def fit(
        self, arguments: TrainingArguments, checkpoint: str | None, *watching: TrainerCallback
    ) -> tuple[Any, Trainer, float]:
        model, trainer, seconds = super().fit(arguments, checkpoint, *watching)
        if REFERENCE in getattr(model, "peft_config", {}):
            model.delete_adapter(REFERENCE)  # else it would be saved too
        return model, trainer, seconds

    def held_out_losses(self, model: Any) -> Losses:
        return self.looks(alone=False).measured(model)

    def account(self) -> dict[str, Any]:
        return {"source": self.source.name, **self.rows.account}

    @property
    def data_content(self) -> str:
        return self.rows.folder.name

    def _part(self, part: Part, at_most: int | None) -> Any:
        """The tokens, or for preferences, which DPOTrainer tokenizes itself, the texts."""
        data = self.rows.part(part, at_most, self.config.data.seed)
        if part != "train" and not len(data):
            return None
        return data.map(_pair, remove_columns=data.column_names) if self.prefers else data.remove_columns("example")


def read_rows_of(config: RowsConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[RowEncoder, PreparedRows]:
    """The rows of a run as tokens; bad ones are counted. The tokenizer gets the chat template that the config names."""
    set_chat_template(tokenizer, config.data.chat_template)
    assistant, completion = (config.training.get(key) for key in ("assistant_only_loss", "completion_only_loss"))
    encoder = RowEncoder(tokenizer, assistant_only=assistant is not False, completion_only=completion is not False)
    return encoder, prepare_rows(rows_wanted(config), encoder)


def trainable_rows_of(config: RowsConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[RowEncoder, PreparedRows]:
    """What :func:`read_rows_of` gives.

    Raises:
        DataError: there are bad rows that are not to be skipped, or none is left to train on.
    """
    encoder, rows = read_rows_of(config, tokenizer)
    require_good_rows(rows.account, config.data.skip_bad_rows)
    if not rows.account["parts"].get("train"):
        raise DataError(f"data: {sources(config.data)[0].name} leaves no rows to train on: {rows.account['parts']}")
    return encoder, rows


def open_rows(config: RowsConfig) -> OwnRows:
    """Load model and rows; what cannot be loaded or trained fails here, before any work.

    Raises:
        ConfigError: the model has no chat template, or too few positions.
        DataError: rows cannot be read, or bad ones are not to be skipped.
    """
    require(rows_needs(config))
    for source in sources(config.data):
        source.check()
    check_place(cache_folder() / "rows" / "tokens")
    model, tokenizer = load_base_model(config.model)
    encoder, rows = trainable_rows_of(config, tokenizer)
    longest = min(rows.account["max_length"] or math.inf, rows.account["tokens"]["longest"])
    check_positions(model.config, "training.max_length", longest, "rows")
    if rows.account["format"] != "text" and tokenizer.chat_template:
        stop_at_turns_end(model, tokenizer)
    return OwnRows(config, model, tokenizer, encoder, rows)


def sources(data: RowsSection) -> tuple[Source, ...]:
    """Where the rows are from: those to train on, and those of a test file or split."""
    if data.hub is not None:
        splits = (data.hub.split, data.hub.test_split)
        return tuple(HubSource(data.hub, split) for split in splits if split is not None)
    return tuple(FileSource(Path(place)) for place in (data.train, data.test) if place is not None)


def rows_wanted(config: RowsConfig) -> RowsWanted:
    """What a run's config says about reading its rows."""
    train, *test = sources(config.data)
    shares = Shares(config.data.validation_part if config.validates else 0.0, config.data.test_part)
    max_length = config.training.get("max_length", 1024)  # TRL's default
    return RowsWanted(train, test[0] if test else None, config.data.format, shares, max_length)


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(row["example"])
    return {name: values[name] for name in ("prompt", "chosen", "rejected")}
