"""What a run learns from and is judged by: what questions and a user's own rows have in common."""

from __future__ import annotations

import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType

from smoa.errors import ConfigError
from smoa.layers.distributed import is_distributed
from smoa_lab.basics.foreign import foreign_warnings_ignored
from smoa_lab.basics.without_secrets import Unsaved, names_secret
from smoa_lab.config.rows_config import RowsConfig
from smoa_lab.config.run_config import Run, RunConfig
from smoa_lab.lessons.adapting import after_training, with_adapter
from smoa_lab.lessons.progress import REPLACED, ProgressReport
from smoa_lab.models.base_models import base_content
from smoa_lab.scoring.row_losses import Losses

logger = logging.getLogger(__name__)

Stage = Literal["before", "after"]


class Looks(ABC):
    """What held-out data show before and after training. ``evaluation`` has the scores of each stage."""

    def __init__(self) -> None:
        self.evaluation: dict[str, dict[str, Any]] = {}
        self.written: dict[str, list[str]] = {}

    @abstractmethod
    def look(self, model: Any, stage: Stage) -> None:
        """Score the held-out data, if there are any, and let the model write."""

    @property
    @abstractmethod
    def gain(self) -> dict[str, float] | None:
        """What changed, with standard errors; None unless both stages were scored."""

    @property
    @abstractmethod
    def asked(self) -> Sequence[tuple[str, str]]:
        """The prompts that the model answered, as text, each with its reference answer."""

    @property
    def samples(self) -> list[dict[str, str]]:
        """Question, reference answer, and what was written at each stage: as ``metrics.json`` has them."""
        return [
            {
                "question": question,
                "reference": reference,
                **{stage: texts[number] for stage, texts in self.written.items()},
            }
            for number, (question, reference) in enumerate(self.asked)
        ]


class Lesson(ABC):
    """A run's data and base model, loaded: all that it needs before its first step."""

    config: Run
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    @abstractmethod
    def title(self) -> str:
        """What is learned, in a few words."""

    @abstractmethod
    def arguments(self) -> TrainingArguments:
        """The trainer's arguments."""

    @abstractmethod
    def looks(self, alone: bool) -> Looks:
        """What will be measured; ``alone`` is false if the model is spread over several processes."""

    @abstractmethod
    def trainer(self, model: Any, arguments: Any, **options: Any) -> Trainer:
        """The trainer of the model, with its data."""

    @abstractmethod
    def held_out_losses(self, model: Any) -> Losses:
        """The losses of the gold answers of all held-out questions, or of all held-out rows."""

    @abstractmethod
    def account(self) -> dict[str, Any]:
        """Which data there are, and what was left out of them."""

    @property
    @abstractmethod
    def data_content(self) -> str:
        """What changes when the data do."""

    def inputs(self) -> dict[str, str]:
        """What the run starts from, by content: a resumed run must find the same."""
        return {"data": self.data_content, "base model": base_content(self.config.model)}

    def truncation(self) -> dict[str, Any]:
        """What training loses by cutting, where :meth:`account` does not have it."""
        return {}

    @foreign_warnings_ignored()
    def fit(
        self, arguments: TrainingArguments, checkpoint: str | None, *watching: TrainerCallback
    ) -> tuple[Any, Trainer, float]:
        """The trained model, its trainer, and the seconds that training took."""
        set_seed(arguments.seed)  # the adapter's factors are drawn here
        method, revision = self.config.method, self.config.model.options.get("revision")
        model = with_adapter(self.base, self.tokenizer, method, self.config.adapter, revision)
        if checkpoint and _is_over(checkpoint):
            arguments = _without_steps(arguments)
        trainer = self.trainer(
            model, arguments, callbacks=[ProgressReport(), *watching], processing_class=self.tokenizer
        )
        for callback in REPLACED:
            trainer.remove_callback(callback)
        logger.info("Training on %s by %s", self.title, type(trainer).__name__)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        after_training(model, method)
        return model, trainer, time.perf_counter() - started


def checked_arguments(arguments: TrainingArguments) -> TrainingArguments:
    """``arguments``, changed to pin memory only for a GPU, and to leave tokens out of checkpoints.

    Raises:
        ConfigError: accelerate counts fewer processes than there are, or a package of ``report_to`` is not installed.
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
    # Pinned memory speeds up copies to a GPU; without one torch only warns.
    arguments.dataloader_pin_memory &= arguments.device.type == "cuda"
    for key, value in vars(arguments).items():
        if isinstance(value, str) and names_secret(key):
            setattr(arguments, key, Unsaved(value))
    return arguments


def check_validation(config: RunConfig | RowsConfig, found: int, what: str) -> None:
    """Raise ConfigError if a run is to be scored while it trains, and no ``what`` are found for that."""
    if config.validates and not found:
        key = "validation_part" if config.data.validation_examples != 0 else "validation_examples"
        raise ConfigError(
            f"data.{key}: {getattr(config.data, key)} of the {what} are none, and training.eval_strategy needs some; "
            f"raise it, give more {what}, or leave eval_strategy out"
        )


def _is_over(checkpoint: str) -> bool:
    """Whether a run had taken its last step when it saved this checkpoint, or had no patience left."""
    state: Any = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if state.global_step >= state.max_steps:
        return True
    stopping = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
    if stopping is None:
        return False
    waited = stopping["attributes"]["early_stopping_patience_counter"]
    return bool(waited >= stopping["args"]["early_stopping_patience"])


def _without_steps(arguments: TrainingArguments) -> TrainingArguments:
    """The same arguments with no step left: from a checkpoint within an epoch the Trainer always takes another one."""
    none = copy.copy(arguments)
    none.max_steps, none.num_train_epochs = -1, 0
    none.lr_scheduler_type, none.lr_scheduler_kwargs = SchedulerType.CONSTANT, None  # others divide by the steps
    return none
