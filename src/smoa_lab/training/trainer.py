"""TRL's trainer of a run: its adapter given to the base, its rows, what it logs."""

from __future__ import annotations

import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from peft import PeftConfig
from tqdm import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SchedulerType

from smoa.distributed import is_distributed
from smoa.errors import ConfigError
from smoa_lab.basics.names import nearest
from smoa_lab.data.row import Part
from smoa_lab.training.guards import Guard, guarded
from smoa_lab.training.loaded_run import LoadedRun

logger = logging.getLogger(__name__)

SHOWN = ("loss", "eval_loss", "learning_rate")
"""What is shown of the Trainer's logs."""


def make_trainer(run: LoadedRun, peft_config: PeftConfig | None) -> Trainer:
    """TRL's trainer for the run, whose ``model`` is the base with its new adapter, or for full fine-tuning the base
    itself. What TRL and transformers refuse shows here."""
    import trl

    config, arguments = run.config, run.config.arguments()
    if is_distributed() and arguments.world_size < dist.get_world_size():
        raise ConfigError(
            f"training.deepspeed: accelerate counts {arguments.world_size} of {dist.get_world_size()} processes, as it "
            "does for DeepSpeed without a GPU, and all would train on the same data; leave deepspeed out, or use GPUs"
        )
    # Pinned memory speeds up copies to a GPU; without one torch only warns.
    arguments.dataloader_pin_memory &= arguments.device.type == "cuda"
    set_seed(arguments.seed)  # the adapter's factors are drawn here
    if peft_config is not None and (revision := config.model.options.get("revision")) is not None:
        peft_config.revision = revision  # whoever loads the adapter gets the same base
    chosen: Any = trl.SFTTrainer
    if arguments.device.type != "cuda":
        from smoa_lab.training.sparse_trainer import SparseSFTTrainer  # here, since it imports TRL

        chosen = SparseSFTTrainer
        if config.adapter.get("orth_reg_weight"):  # which AdaLoRA adds to the loss that the model computes
            logger.warning("adapter.orth_reg_weight: does nothing on a CPU, where the loss is computed without it")
    settings: Any = run.base.config.get_text_config()
    routers = getattr(settings, "output_router_logits", None)
    patience, validates = config.early_stopping, str(config.training.get("eval_strategy", "no")) != "no"
    if getattr(arguments, "activation_offloading", False) and arguments.device.type == "cpu":
        raise ConfigError(
            "training.activation_offloading: moves activations from a GPU, and there is none; leave it out"
        )
    if arguments.use_liger_kernel and find_spec("liger_kernel") is None:
        raise ConfigError("training.use_liger_kernel: the package liger-kernel is missing; install it, or leave it out")
    guard = Guard()
    callbacks = [guard, ProgressReport(), *([] if patience is None else [EarlyStoppingCallback(patience)])]
    try:
        trainer: Any = guarded(chosen)(
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
        if arguments.world_size == 1:  # what it says of optimizer and scheduler comes before the scoring, too
            trainer.create_optimizer_and_scheduler(1)
            trainer.optimizer = trainer.lr_scheduler = None
    except Exception as error:  # of any kind: also of the Hub, for push_to_hub
        raise ConfigError(f"training: TRL, transformers or PEFT refuses: {error}") from error
    _check_arguments(trainer)
    if routers is not None:  # TRL asks mixtures for them in each step; with a cache of keys and values that fails
        settings.output_router_logits = routers
    trainer.guard = guard
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


def _check_arguments(trainer: Any) -> None:
    """Raise ConfigError for what the Trainer refuses in the middle of a run, or ends at once for."""
    arguments = trainer.args
    rows, batch = len(trainer.train_dataset), arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and rows < batch:
        found = f"drops the only batch, of {rows} rows, which is smaller than {batch}"
        raise ConfigError(f"training.dataloader_drop_last: {found}; leave it out, or lower the batch size")
    known = ["loss"]
    if type(trainer).__name__ == "SFTTrainer":
        known += ["entropy", "mean_token_accuracy"]
    best = str(arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in known:
        raise ConfigError(f"training.metric_for_best_model: the trainer measures no {best!r}{nearest(best, known)}")


def _dataset(run: LoadedRun, part: Part) -> Any:
    """The tokens; None for no rows."""
    data = run.data.part(part)
    return data.select_columns(["input_ids", "labels"]) if len(data) else None


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
    """Times steps, and ends the training after so many of them, or so many seconds after the first."""

    def __init__(self, most: int, limit: float) -> None:
        self.most, self.limit = most, limit
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        later = self.seconds[1:]  # the first one is tried beforehand (`Guard`), and warms up
        control.should_training_stop |= len(self.seconds) >= self.most or (bool(later) and sum(later) >= self.limit)


def _is_over(checkpoint: str) -> bool:
    """Whether a run had taken its last step when it saved this checkpoint, or had no patience left."""
    state: Any = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if state.global_step >= state.max_steps:
        return True
    stopping = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
    waited = stopping and stopping["attributes"]["early_stopping_patience_counter"]
    return bool(stopping and waited >= stopping["args"]["early_stopping_patience"])
