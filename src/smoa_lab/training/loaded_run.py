"""A run's data and base model, loaded: all that it needs before its first step, and its training by TRL."""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from peft import TrainableTokensConfig
from peft.tuners.tuners_utils import check_target_module_exists
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SchedulerType

from smoa.atomic import check_place
from smoa.errors import ConfigError, DataError
from smoa.layers.distributed import is_distributed
from smoa_lab.base_models import base_content, load_base_model
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.positions import positions_of
from smoa_lab.config.methods import find_method
from smoa_lab.config.run import RowsSection, RunConfig
from smoa_lab.data.chat_templates import set_chat_template, stop_at_turns_end
from smoa_lab.data.encoding import Encoder, Tokens
from smoa_lab.data.files import FileSource, HubSource, RowSource
from smoa_lab.data.prepared import Part, PreparedRows, Reading, Shares, require_good_rows
from smoa_lab.data.rows import Row, row_from_json
from smoa_lab.data.tasks import Selection
from smoa_lab.scoring.evaluation import Evaluation
from smoa_lab.training.adapting import with_adapter

logger = logging.getLogger(__name__)

REFERENCE = "ref"
"""DPOTrainer's name of its copy of the untrained adapter, which it compares with."""
LENGTH = 1024
"""TRL's own limit of a row's tokens."""
REPLACED = (PrinterCallback, ProgressCallback)
"""The Trainer's own callbacks, which :class:`ProgressReport` replaces."""
SHOWN = ("loss", "eval_loss", "learning_rate")
"""What is shown of the Trainer's logs."""


@dataclass(frozen=True)
class LoadedRun:
    """Model, data, and the encoder that turns the data into tokens. ``data`` are questions, or rows on disk."""

    config: RunConfig
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    data: Selection | PreparedRows

    @property
    def title(self) -> str:
        """What is learned, in a few words."""
        return sources(self.config.rows)[0].name if self.config.has_rows else ", ".join(self.config.questions.tasks)

    @property
    def format(self) -> str | None:
        """The format of rows; None for questions."""
        return self.data.account["format"] if isinstance(self.data, PreparedRows) else None

    def account(self) -> dict[str, Any]:
        """Which data there are, and what was left out of them."""
        own = {"source": self.title} if self.config.has_rows else {}
        return {**own, **self.data.account}

    def truncation(self) -> dict[str, Any]:
        """What training loses by cutting, where :meth:`account` does not have it."""
        if isinstance(self.data, PreparedRows):
            return {}
        tokens = self._question_tokens
        return {
            "truncation": {
                "prompts_cut": sum(row.cut > 0 for row in tokens),
                "prompt_tokens_cut": sum(row.cut for row in tokens),
                "answers_cut": sum(row.answer_cut > 0 for row in tokens),
            }
        }

    def inputs(self) -> dict[str, str]:
        """What the run starts from, by content: a resumed run must find the same."""
        content = self.data.folder.name if isinstance(self.data, PreparedRows) else self.data.content
        return {"data": content, "base model": base_content(self.config.model)}

    def trained_keys(self) -> NDArray[np.uint64]:
        """The keys of the rows that are trained on, each once, sorted."""
        if isinstance(self.data, Selection):
            rows: Iterable[Row] = self.data.train
        else:
            part = self.data.part("train", self.config.rows.train_examples, self.config.rows.seed)
            rows = (row_from_json(row["row"]) for row in part.select_columns("row"))
        return np.unique(np.fromiter((row.key for row in rows), np.uint64))

    def evaluation(self, alone: bool = True) -> Evaluation:
        """What will be measured; ``alone`` is false if the model is spread over several processes, which write
        nothing."""
        task = self.config.task
        if isinstance(self.data, Selection):
            samples = task.samples * alone
            return Evaluation(self.encoder, self.data.test, samples, task.eval_batch_tokens, task.baseline)
        section = self.config.rows
        held_out = self.data.rows("test", section.test_examples, section.seed)
        return Evaluation(self.encoder, held_out, section.samples * alone)

    def arguments(self) -> TrainingArguments:
        """The trainer's arguments.

        Raises:
            ConfigError: a key is for another trainer, there is nothing to validate on, the tokenizer has no token to
                fill batches with, or the adapter is on the output layer, whose own weight TRL computes the loss from.
        """
        if self.tokenizer.pad_token is None:
            raise ConfigError(
                "model.name: its tokenizer has neither a pad_token nor an eos_token, and TRL needs one; add an "
                "eos_token to the tokenizer_config.json of the model's folder"
            )
        data, rows = self.config.data, isinstance(self.data, PreparedRows)
        number = self.data.account["parts"].get("validation", 0) if rows else len(self.data.validation)  # type: ignore[union-attr]
        if self.config.validates and not number:
            what, key = "rows" if rows else "questions", "validation_part"
            key = key if data.validation_examples != 0 else "validation_examples"
            raise ConfigError(
                f"data.{key}: {getattr(data, key)} of the {what} are none, and training.eval_strategy needs some; "
                f"raise it, give more {what}, or leave eval_strategy out"
            )
        wanted = find_method(self.config.method).peft_config(self.config.adapter)
        if isinstance(wanted, TrainableTokensConfig) and getattr(self.base.config, "tie_word_embeddings", False):
            raise ConfigError(
                "method: trainable_tokens would adapt the output layer, which is tied to the embeddings, and TRL would "
                "not train it; use lora with adapter.trainable_token_indices"
            )
        if getattr(wanted, "target_modules", None) is not None:  # PEFT's defaults for a model leave the head out
            head = self.base.get_output_embeddings()
            name = next((name for name, module in self.base.named_modules() if module is head), None)
            if name is not None and check_target_module_exists(wanted, name):
                raise ConfigError(
                    f"adapter.target_modules: names {name}, the output layer, which TRL would not train; leave it out"
                )
        return checked_arguments(self.config.arguments(self.format), self.base)

    def fit(
        self, arguments: TrainingArguments, checkpoint: str | None, *watching: TrainerCallback
    ) -> tuple[Any, Trainer, float]:
        """The trained model, its trainer, and the seconds that training took."""
        set_seed(arguments.seed)  # the adapter's factors are drawn here
        method, revision = self.config.method, self.config.model.options.get("revision")
        model = with_adapter(self.base, method, self.config.adapter, revision)
        if checkpoint and _is_over(checkpoint):  # within an epoch the Trainer would take another step
            arguments = copy.copy(arguments)
            arguments.max_steps, arguments.num_train_epochs = -1, 0
            arguments.lr_scheduler_type = SchedulerType.CONSTANT  # others divide by the steps
            arguments.lr_scheduler_kwargs = None
        settings: Any = self.base.config.get_text_config()
        routers = getattr(settings, "output_router_logits", None)
        trainer = self._trainer(model, arguments, [ProgressReport(), *watching])
        logger.info("Training on %s by %s", self.title, type(trainer).__name__)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        if routers is not None:  # TRL lets mixtures give them, for a loss that a cache of keys and values breaks
            settings.output_router_logits = routers
        seconds = time.perf_counter() - started
        if REFERENCE in getattr(model, "peft_config", {}):
            model.delete_adapter(REFERENCE)  # otherwise it would be saved too
        return model, trainer, seconds

    def _trainer(self, model: Any, arguments: Any, callbacks: list[TrainerCallback]) -> Trainer:
        import trl

        if self.config.early_stopping is not None:
            callbacks = [*callbacks, EarlyStoppingCallback(self.config.early_stopping)]
        chosen: Any = trl.DPOTrainer if self.format == "preference" else trl.SFTTrainer
        if chosen is trl.SFTTrainer and arguments.device.type != "cuda":
            from smoa_lab.training.sparse_trainer import SparseSFTTrainer  # here, since it imports TRL

            chosen = SparseSFTTrainer
        try:
            trainer: Trainer = chosen(
                model=model,
                args=arguments,
                train_dataset=self._dataset("train"),
                eval_dataset=self._dataset("validation"),
                processing_class=self.tokenizer,
                callbacks=callbacks,
            )
        except ValueError as error:
            raise ConfigError(f"training: TRL refuses: {error}") from error
        vars(trainer)["create_model_card"] = lambda **_: None  # the adapter gets a card of ours
        for callback in REPLACED:
            trainer.remove_callback(callback)
        return trainer

    @cached_property
    def _question_tokens(self) -> list[Tokens]:
        return [self.encoder.encode(row) for row in self.data.train] if isinstance(self.data, Selection) else []

    def _dataset(self, part: Part) -> Any:
        """The tokens, or for preferences, which DPOTrainer tokenizes itself, the texts; None for no validation rows."""
        if isinstance(self.data, Selection):
            validation = self.data.validation
            tokens = self._question_tokens if part == "train" else [self.encoder.encode(row) for row in validation]
            from datasets import Dataset

            return Dataset.from_list([row.columns for row in tokens]) if tokens else None
        section = self.config.rows
        at_most = section.train_examples if part == "train" else section.validation_examples
        data = self.data.part(part, at_most, section.seed)
        if part != "train" and not len(data):
            return None
        if self.format != "preference":
            return data.remove_columns("row")
        texts = data.map(lambda row: json.loads(row["row"]), remove_columns=data.column_names)
        return texts.select_columns(["prompt", "completion", "rejected"]).rename_column("completion", "chosen")


def load_run(config: RunConfig, questions: Selection | None = None, trains: bool = True) -> LoadedRun:
    """Load data, unless ``questions`` are given, and model; what cannot be loaded or, if it ``trains``, be trained
    fails here, before any work.

    Raises:
        ConfigError: the model has fewer positions than rows may have tokens, or no chat template.
        DataError: model or data cannot be loaded, bad rows are not to be skipped, or nothing is left to train on.
    """
    if config.has_rows:
        for source in sources(config.rows):
            source.check()
        check_place(cache_folder() / "rows" / "tokens")
    elif questions is None:
        questions = config.questions.select()
    if trains and questions is not None and not questions.train:
        raise DataError(f"data.tasks: {', '.join(config.questions.tasks)} leave no training examples")
    base, tokenizer = load_base_model(config.model)
    data: Selection | PreparedRows
    if questions is not None:
        encoder, data = encoder_of(config, tokenizer), questions
        key, longest = "task.max_length", config.task.max_length
    else:
        encoder, data = trainable_rows_of(config, tokenizer, trains)
        key, longest = (
            "training.max_length",
            min(data.account["max_length"] or math.inf, data.account["tokens"].get("longest", 0)),
        )
        if data.account["format"] != "text" and tokenizer.chat_template:
            stop_at_turns_end(base, tokenizer)
    positions = positions_of(base.config)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"{key}: rows of up to {longest:,} tokens would be given to this model, which has {positions:,} positions; "
            f"set it to {positions}"
        )
    return LoadedRun(config, base, tokenizer, encoder, data)


def encoder_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The encoder that a run's config asks for. The tokenizer gets the chat template that the config names."""
    if not config.has_rows:
        task = config.task
        return Encoder(tokenizer, task.max_length, task.template, task.answer)
    set_chat_template(tokenizer, config.rows.chat_template)
    assistant, completion = (config.training.get(key) for key in ("assistant_only_loss", "completion_only_loss"))
    length = config.training.get("max_length", LENGTH)
    return Encoder(tokenizer, length, assistant_only=assistant is not False, completion_only=completion is not False)


def read_rows_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Encoder, PreparedRows]:
    """The rows of a run as tokens; bad ones are counted."""
    encoder, section = encoder_of(config, tokenizer), config.rows
    train, *test = sources(section)
    shares = Shares(section.validation_part if config.validates else 0.0, section.test_part)
    return encoder, Reading(train, test[0] if test else None, section.format, shares, encoder).prepare()


def trainable_rows_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, trains: bool = True
) -> tuple[Encoder, PreparedRows]:
    """What :func:`read_rows_of` gives.

    Raises:
        DataError: there are bad rows that are not to be skipped, or, if the run ``trains``, none is left to train on.
    """
    encoder, rows = read_rows_of(config, tokenizer)
    require_good_rows(rows.account, config.rows.skip_bad_rows)
    account = rows.account
    if trains and not account["parts"].get("train"):
        raise DataError(
            f"{sources(config.rows)[0].name}: leaves no rows to train on: {account['also_in_test']} are in the test "
            f"data too, {account['dropped']} have nothing trained within {account['max_length']} tokens, "
            f"{account['parts'].get('test', 0)} are held out, {account['bad']} are bad"
        )
    return encoder, rows


def sources(data: RowsSection) -> Sequence[RowSource]:
    """Where rows are from: those to train on, and those of a test file or split."""
    if data.hub is not None:
        splits = (data.hub.split, data.hub.test_split)
        return [HubSource(data.hub, split) for split in splits if split is not None]
    return [FileSource(Path(place)) for place in (data.train, data.test) if place is not None]


class ProgressReport(TrainerCallback):
    """One log line for each of the Trainer's logs; on a terminal also a bar."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        off = None if state.is_world_process_zero and not args.disable_tqdm else True  # None: without a terminal
        self.bar = tqdm(desc="training", total=state.max_steps, initial=state.global_step, disable=off)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        shown = [f"{name} {float(logs[name]):.4g}" for name in SHOWN if logs and name in logs]
        if shown and state.is_world_process_zero:
            self.bar.set_postfix_str(shown[0])
            with self.bar.external_write_mode(sys.stderr):
                logger.info("step %d/%d: %s", state.global_step, state.max_steps, ", ".join(shown))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def checked_arguments(arguments: TrainingArguments, model: PreTrainedModel | None = None) -> TrainingArguments:
    """``arguments``, changed to pin memory only for a GPU.

    Raises:
        ConfigError: accelerate counts fewer processes than there are, a package of ``report_to`` or ``optim`` is not
            installed, or the scheduler lacks settings.
    """
    if is_distributed() and arguments.world_size < dist.get_world_size():
        raise ConfigError(
            f"training.deepspeed: accelerate counts {arguments.world_size} of {dist.get_world_size()} processes, as it "
            "does for DeepSpeed without a GPU, and all would train on the same data; leave deepspeed out, or use GPUs"
        )
    try:
        for reporter in get_reporting_integration_callbacks(arguments.report_to):
            reporter()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ConfigError(f"training.report_to: {error}") from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        settings: Any = arguments.lr_scheduler_kwargs
        get_scheduler(arguments.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), 0, 1, settings)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training.optim or training.lr_scheduler_type: {error}") from error
    # Pinned memory speeds up copies to a GPU; without one torch only warns.
    arguments.dataloader_pin_memory &= arguments.device.type == "cuda"
    return arguments


def _is_over(checkpoint: str) -> bool:
    """Whether a run had taken its last step when it saved this checkpoint, or had no patience left."""
    state: Any = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if state.global_step >= state.max_steps:
        return True
    stopping = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
    waited = stopping and stopping["attributes"]["early_stopping_patience_counter"]
    return bool(stopping and waited >= stopping["args"]["early_stopping_patience"])
