"""Chooses the settings of a first config from what is known of model, data and machine. Nothing is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

from smoa.errors import ConfigError
from smoa_lab.basics.nearest import nearest
from smoa_lab.config.run import Dtype, adapter_rate
from smoa_lab.runs.budget_choices import ALL_LINEAR, Choice
from smoa_lab.starting.machine import Machine
from smoa_lab.starting.survey import DataFacts, ModelFacts

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCH = 16
"""Rows that a step learns from, in one or several batches."""
EPOCHS = 3
"""Times that all rows are seen, unless that takes too long."""
LARGEST = {True: 16, False: 4}
"""Rows in a batch at most, with and without a GPU. On a CPU more are hardly quicker, and padded more."""
SHARE = {True: 0.85, False: 0.5}
"""The share of free memory that a run may use, with and without a GPU: others use the CPU's memory too."""
ADAPTER_BYTES = 16
"""A trained parameter in float32, with its gradient and AdamW's two averages."""


@dataclass(frozen=True)
class Proposal:
    """What is proposed, and for what. ``rows`` are those of a batch, of which a step has ``accumulation``."""

    model: ModelFacts
    data: DataFacts
    choice: Choice
    dtype: Dtype
    rows: int
    checkpointing: bool
    steps: int | None = None

    @property
    def accumulation(self) -> int:
        return BATCH // self.rows

    @property
    def steps_of_epochs(self) -> int:
        """Steps in which all rows are seen :data:`EPOCHS` times, as transformers' Trainer counts them."""
        return EPOCHS * math.ceil(math.ceil(self.data.train / self.rows) / self.accumulation)

    @property
    def all_steps(self) -> int:
        return self.steps or self.steps_of_epochs

    def within(self, minutes: float, seconds: float) -> Proposal:
        """The proposal cut to at most so many minutes, at so many seconds a step, and to at least one step."""
        affordable = max(1, int(60 * minutes / seconds))
        return replace(self, steps=affordable if affordable < self.steps_of_epochs else None)

    def smaller(self) -> Proposal:
        """The proposal in less memory: half the batch twice as often, and at last activations computed again.

        Raises:
            ConfigError: nothing is left to save.
        """
        if self.rows > 1:
            return replace(self, rows=self.rows // 2)
        if not self.checkpointing:
            return replace(self, checkpointing=True)
        raise ConfigError(
            f"model.name: {self.model.name!r} does not fit into memory, not even with one row of "
            f"{self.data.max_length} tokens in a batch; choose a smaller model, or --dtype bfloat16"
        )

    def values(self, output_dir: str) -> dict[str, Any]:
        """The config as plain values, in the order in which it is written."""
        length = {"max_length": self.data.max_length}
        length_of_questions = {} if self.data.format else {"task": length}
        last = {"num_train_epochs": EPOCHS} if self.steps is None else {"max_steps": self.steps}
        return {
            "model": {"name": self.model.name, "dtype": self.dtype},
            "method": "smoa",
            "adapter": {
                "target_modules": ALL_LINEAR,
                "num_blocks": self.choice.num_blocks,
                "r": self.choice.r,
                "alpha": 2 * self.choice.r,
            },
            "data": self.data.values,
            **length_of_questions,
            "training": {
                "output_dir": output_dir,
                **last,
                "per_device_train_batch_size": self.rows,
                "gradient_accumulation_steps": self.accumulation,
                **(length if self.data.format else {}),
                "gradient_checkpointing": self.checkpointing,
                "learning_rate": adapter_rate(self.model.parameters),
                "logging_steps": max(1, min(10, self.all_steps // 10)),
                "seed": 0,
            },
        }


def propose(
    model: ModelFacts, data: DataFacts, choice: Choice, machine: Machine, dtype: Dtype | None = None
) -> Proposal:
    """The largest batch whose estimated need fits; activations are computed again only if one row would not fit."""
    chosen: Dtype = dtype or ("bfloat16" if machine.bfloat16 else "float32")
    has_gpu = machine.gpu is not None
    proposal = Proposal(model, data, choice, chosen, LARGEST[has_gpu], checkpointing=False)
    while needed_bytes(proposal) > SHARE[has_gpu] * machine.memory:
        if proposal.rows == 1 and proposal.checkpointing:
            break  # the estimate is coarse: three steps will tell
        proposal = proposal.smaller()
    if proposal.checkpointing:  # which leaves room for more than one row
        larger = (replace(proposal, rows=2**power) for power in range(LARGEST[has_gpu].bit_length() - 1, 0, -1))
        fitting = (one for one in larger if needed_bytes(one) <= SHARE[has_gpu] * machine.memory)
        proposal = next(fitting, proposal)
    return proposal


def needed_bytes(proposal: Proposal) -> int:
    """A coarse estimate of what training takes: weights, adapter, activations and logits, each row at full length.

    A layer keeps about 48 bytes of each hidden and 16 of each intermediate number of a token, with weights of 16 bits
    too, since the adapter computes in float32; if activations are computed again, one layer does, and each keeps its
    input. The loss keeps the logits as they are, in float32, and their gradient.
    """
    model, size = proposal.model, BYTES[proposal.dtype]
    sides = 2 if proposal.data.format == "preference" else 1  # the chosen and the rejected answer
    tokens = sides * proposal.rows * proposal.data.max_length
    layer = 48 * model.hidden + 16 * model.intermediate
    kept = layer + size * model.hidden * model.layers if proposal.checkpointing else layer * model.layers
    logits = (size + 8) * model.vocabulary
    return size * model.parameters + ADAPTER_BYTES * proposal.choice.parameters + tokens * (kept + logits)


def known_dtype(name: str) -> Dtype:
    """The dtype of this name; raises ConfigError if there is none."""
    found: Dtype | None = next((one for one in get_args(Dtype) if one == name), None)
    if found is None:
        raise ConfigError(f"dtype: there is no {name!r}{nearest(name, get_args(Dtype))}; known are {get_args(Dtype)}")
    return found
