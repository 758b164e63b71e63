"""Measures three steps of a proposed run, in a temporary folder, and makes the batch smaller until it fits."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from smoa_lab.config.run import check_config
from smoa_lab.starting.proposal import Proposal
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import peak_memory

logger = logging.getLogger(__name__)

STEPS = 3


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, and bytes at most."""

    seconds: float
    memory: int


class StepClock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The mean time of a step, without the first one, in which memory is claimed and code is compiled."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def measure(proposal: Proposal) -> tuple[Proposal, Measured]:
    """What three steps take; the proposal with a smaller batch if it ran out of memory.

    Raises:
        ConfigError: one row does not fit.
    """
    while True:
        try:
            return proposal, _three_steps(proposal)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        _forget()
        proposal = proposal.smaller()
        logger.info("Out of memory; trying again with batches of %d", proposal.rows)


def ran_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """A CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _three_steps(proposal: Proposal) -> Measured:
    with tempfile.TemporaryDirectory(prefix="smoa-init-") as folder:
        values = proposal.values(folder)
        training = {key: value for key, value in values["training"].items() if key != "num_train_epochs"}
        short = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": STEPS}
        run = load_run(check_config({**values, "training": {**training, **short}}))
        clock = StepClock()
        arguments = run.arguments()
        logger.info("Measuring %d steps", STEPS)
        run.fit(arguments, None, clock)
        return Measured(clock.seconds, peak_memory(arguments.device))


def _forget() -> None:
    """Free what the failed steps held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
