"""TRL's trainer of a run: its adapter given to the base, its rows, what it logs, and what ends a run that diverges."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from tqdm import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SchedulerType
from trl.trainer.sft_trainer import SFTTrainer

from smoa.errors import ConfigError
from smoa_lab.data.encoding import IGNORED
from smoa_lab.data.row import Part
from smoa_lab.scoring.losses import answer_positions, logits_at, wanted_logits
from smoa_lab.training.loaded_run import LoadedRun

logger = logging.getLogger(__name__)

SHOWN = ("loss", "eval_loss", "learning_rate")
"""What is shown of the Trainer's logs."""
MOST_BAD = 3
"""Steps in a row without finite gradients that end a run."""


class SparseSFTTrainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
    """TRL's, with logits at trained tokens only. Without Triton, as on a CPU, TRL computes the output layer at every
    position: of Gemma 3 270M, whose vocabulary has 262,144 tokens, a step on short questions takes twenty times as
    long. For every loss but ``nll``, and with an auxiliary loss, TRL computes it.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        arguments: Any = self.args
        if arguments.loss_type != "nll" or self.label_smoother or self.aux_loss_enabled or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call, unused-ignore]
        labels = inputs.pop("labels")
        targets, positions = labels[:, 1:][labels[:, 1:] != IGNORED], answer_positions(labels)
        with logits_at(self.accelerator.unwrap_model(model), positions):
            logits = wanted_logits(model(**{**inputs, "use_cache": False}).logits, positions)
        total = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")
        if num_items_in_batch is None:
            return total / max(1, len(targets))
        across = self.accelerator.num_processes if arguments.average_tokens_across_devices else 1
        return total * across / num_items_in_batch


class Diverged(ConfigError):  # noqa: N818 - says what the run did
    """A run's gradients are not finite any more."""


def make_trainer(run: LoadedRun, peft_config: PeftConfig | None) -> Trainer:
    """TRL's trainer for the run, whose ``model`` is the base with its new adapter, or for full fine-tuning the base
    itself. What TRL and transformers refuse shows here."""
    config, arguments = run.config, run.config.arguments()
    # Pinned memory speeds up copies to a GPU; without one torch only warns.
    arguments.dataloader_pin_memory &= arguments.device.type == "cuda"
    set_seed(arguments.seed)  # the adapter's factors are drawn here
    if peft_config is not None and (revision := config.model.options.get("revision")) is not None:
        peft_config.revision = revision  # whoever loads the adapter gets the same base
    chosen: Any = SFTTrainer if arguments.device.type == "cuda" else SparseSFTTrainer
    settings: Any = run.base.config.get_text_config()
    routers = getattr(settings, "output_router_logits", None)
    patience, validates = config.early_stopping, str(config.training.get("eval_strategy", "no")) != "no"
    callbacks = [FiniteSteps(), ProgressReport(), *([] if patience is None else [EarlyStoppingCallback(patience)])]
    trainer: Any = chosen(
        model=run.base,
        args=arguments,
        train_dataset=_dataset(run, "train"),
        eval_dataset=_dataset(run, "validation") if validates else None,
        processing_class=run.tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    if getattr(run.base, "is_quantized", False):  # TRL makes these factors bfloat16, and they are loaded as float32
        for each in (each for each in trainer.model.parameters() if each.requires_grad):
            each.data = each.data.float()
    if routers is not None:  # TRL asks mixtures for them in each step; with a cache of keys and values that fails
        settings.output_router_logits = routers
    vars(trainer)["create_model_card"] = lambda **_: None  # the adapter gets a card of ours
    for callback in (PrinterCallback, ProgressCallback):  # which ProgressReport replaces
        trainer.remove_callback(callback)
    return cast(Trainer, trainer)


def fit(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint if there is one."""
    arguments: Any = trainer.args
    if checkpoint and _is_over(checkpoint):  # within an epoch the Trainer would take another step
        arguments.max_steps, arguments.num_train_epochs = -1, 0
        arguments.lr_scheduler_type = SchedulerType.CONSTANT  # others divide by the steps
        arguments.lr_scheduler_kwargs = None
    trainer.train(resume_from_checkpoint=checkpoint)


def _dataset(run: LoadedRun, part: Part) -> Any:
    """The tokens; None for no rows."""
    data = run.data.part(part)
    return data.select_columns(["input_ids", "labels"]) if len(data) else None


class FiniteSteps(TrainerCallback):
    """Keeps gradients that are not finite from the optimizer, and ends a run after three such steps in a row. Of fp16
    the scaler keeps them; it halves its scale until they are finite, and only at a scale of one they count."""

    bad = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        if bool(get_total_norm(gradients, torch.inf).isfinite()):
            self.bad = 0
            return
        if (scaler := getattr(optimizer, "scaler", None)) is not None:
            self.bad += scaler.get_scale() <= 1
        else:
            self.bad += 1
            for each in model.parameters():
                each.grad = None
        if self.bad >= MOST_BAD:
            found = f"{MOST_BAD} steps in a row, up to step {state.global_step + 1} of {state.max_steps}"
            remedy = f"lower training.learning_rate ({args.learning_rate:g}), or take float32 as model.dtype"
            told = f"the gradients of {found}, are not finite: the run diverged, and no adapter is saved"
            raise Diverged(f"training: {told}; {remedy}")


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


class Stopwatch(TrainerCallback):
    """Notes when steps end, and ends the training after so many of them, or so many seconds after the first."""

    def __init__(self, most: int, limit: float) -> None:
        self.most, self.limit = most, limit
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())
        control.should_training_stop |= len(self.ends) >= self.most or self.ends[-1] - self.ends[0] >= self.limit


def _is_over(checkpoint: str) -> bool:
    """Whether a run had taken its last step when it saved this checkpoint, or had no patience left."""
    state: Any = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if state.global_step >= state.max_steps:
        return True
    stopping = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
    waited = stopping and stopping["attributes"]["early_stopping_patience_counter"]
    return bool(stopping and waited >= stopping["args"]["early_stopping_patience"])
