"""Shows the progress of a training run: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

logger = logging.getLogger(__name__)

# The Trainer's own callbacks, which ProgressReport replaces.
REPLACED = (PrinterCallback, ProgressCallback)
SHOWN = ("loss", "eval_loss", "learning_rate")


class ProgressReport(TrainerCallback):
    """One log line for each of the Trainer's logs; on a terminal also a bar."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.on_terminal = self.bar.console.is_terminal

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and self.on_terminal:
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.bar.live.is_started:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        shown = [f"{name} {float(logs[name]):.4g}" for name in SHOWN if logs and name in logs]
        if not shown or not state.is_world_process_zero:
            return
        if self.bar.live.is_started:
            self.bar.update(self.task, description=shown[0])
        logger.info("step %d/%d: %s", state.global_step, state.max_steps, ", ".join(shown))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar.live.is_started:  # else it would print an empty line
            self.bar.stop()
