"""A first config for a model and data: what ``smoa init`` looks at, chooses, measures and writes."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from rich.filesize import decimal
from transformers import PretrainedConfig, TrainerCallback

from smoa.errors import ConfigError
from smoa_lab.base_models import empty_model, load_tokenizer
from smoa_lab.basics.extras import require
from smoa_lab.basics.positions import positions_of
from smoa_lab.budget import ALL_LINEAR, Choice, Shapes, budget_choice, shapes_of
from smoa_lab.config.methods import find_method
from smoa_lab.config.run import (
    ConfigText,
    DataSection,
    Dtype,
    ModelSection,
    RunConfig,
    TaskSection,
    adapter_rate,
    check_config,
    native_dtype,
)
from smoa_lab.config.yaml_text import apply_overrides, parse_yaml, to_yaml
from smoa_lab.data.files import source_values
from smoa_lab.data.tasks import TASKS, find_task, task_needs
from smoa_lab.pages.templates import render
from smoa_lab.training.loaded_run import load_run, sources, trainable_rows_of
from smoa_lab.training.run_folder import in_free_folder, peak_memory

logger = logging.getLogger(__name__)

LENGTHS = 64
"""Tokens: a row is cut at a multiple of it."""
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCH = 16
"""Rows that a step learns from, in one or several batches."""
PARAMETERS = "lora:8"
"""How many to train, unless told."""
EPOCHS = 3
"""Times that all rows are seen, unless that takes too long."""
LARGEST = {True: 16, False: 4}
"""Rows in a batch at most, with and without a GPU. On a CPU more are hardly quicker, and padded more."""
SHARE = {True: 0.85, False: 0.5}
"""The share of free memory that a run may use, with and without a GPU: others use the CPU's memory too."""
ADAPTER_BYTES = 16
"""A trained parameter in float32, with its gradient and AdamW's two averages."""
MEASURED_STEPS = 3
WIDEST = 44
"""Characters of a line of the config before its comment, where lines are not longer."""


@dataclass(frozen=True)
class ModelFacts:
    """``parameters`` of the whole model; ``shapes`` of its linear layers but the output; its ``config``."""

    name: str
    parameters: int
    shapes: Shapes
    config: PretrainedConfig

    @property
    def context(self) -> int | None:
        """How many tokens it takes, if that is limited."""
        return positions_of(self.config)


@dataclass(frozen=True)
class DataFacts:
    """``values``: the config's ``data`` block; ``train``: how many rows or questions there are to train on;
    ``max_length``: the tokens at which a row is to be cut; ``format``: of rows, None for questions."""

    values: dict[str, Any]
    train: int
    max_length: int
    format: str | None = None
    tokens: int = 0

    @property
    def kind(self) -> str:
        """What one of them is called."""
        return "rows" if self.format else "questions"


def look_at_model(name: str, trust_remote_code: bool = False) -> ModelFacts:
    """Read a model's sizes from its config alone; no weights are read.

    Raises:
        DataError: there is no such model.
    """
    empty = empty_model(ModelSection(name=name, trust_remote_code=trust_remote_code))
    return ModelFacts(name, empty.num_parameters(), shapes_of(empty, (ALL_LINEAR,), name), empty.config)


def check_data(place: str) -> str:
    """``place`` itself; raises DataError if it can be known without reading that nothing is there."""
    if place not in TASKS:
        for source in sources(check_config({"model": {"name": ""}, "data": source_values(place)}, place).rows):
            source.check()
    return place


def look_at_data(
    place: str, model: ModelFacts, changes: Sequence[str] = (), trust_remote_code: bool = False
) -> DataFacts:
    """Count what ``place`` holds: a task's name, a file, a folder, or a data set of the Hub. Its rows are all read, as
    the ``data.key=value`` of ``changes`` say.

    Raises:
        DataError: rows cannot be read, or some are bad, as `smoa train` would say.
    """
    if place in TASKS:
        require(task_needs({place: find_task(place)}))
        data = DataSection(tasks=[place])
        return DataFacts({"tasks": [place]}, len(data.select().train), TaskSection().max_length)
    wanted = ModelSection(name=model.name, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(wanted)
    lent = None if tokenizer.chat_template else "alpaca"
    values: dict[str, Any] = {
        "model": {"name": model.name},
        "data": {**source_values(place), "chat_template": lent},
        "training": {"max_length": model.context},
    }
    apply_overrides(values, [change for change in changes if change.startswith("data.")])
    config = check_config(values, place)
    _, rows = trainable_rows_of(config, tokenizer)
    account, (first, *_) = rows.account, rows.rows("train", 1)
    template = {"chat_template": lent} if lent and not first.is_text else {}
    length = -(-account["tokens"]["p99"] // LENGTHS) * LENGTHS
    return DataFacts(
        {**source_values(place), "format": account["format"], **template, "test_part": config.rows.test_part},
        account["parts"]["train"],
        length if model.context is None else min(length, model.context),
        account["format"],
        account["tokens"]["total"],
    )


@dataclass(frozen=True)
class Machine:
    """``memory``: bytes that are free where the model will be; ``gpu``: its name, if there is one; ``bfloat16``:
    whether it computes in bfloat16 rather than imitating it."""

    memory: int
    gpu: str | None = None
    bfloat16: bool = False

    @property
    def name(self) -> str:
        """The machine in a few words."""
        return self.gpu or "the CPU"


def this_machine() -> Machine:
    """The machine that runs this, with its first GPU if it has one."""
    bfloat16 = native_dtype() == "bfloat16"
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Machine(free, torch.cuda.get_device_name(), bfloat16)
    return Machine(psutil.virtual_memory().available, None, bfloat16)


@dataclass(frozen=True)
class Proposal:
    """What is proposed, and for what. ``rows`` are those of a batch, of which a step has ``accumulation``."""

    model: ModelFacts
    data: DataFacts
    choice: Choice
    machine: Machine
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

    def text(self, output_dir: str, header: Sequence[str] = ()) -> str:
        """The config as YAML, with a comment for every line."""
        rate = adapter_rate(self.model.parameters)
        values = {"proposal": self, "output_dir": output_dir, "header": header, "epochs": EPOCHS, "rate": rate}
        text = render("config.yaml.jinja", yaml=lambda value: to_yaml({"": value}).partition(": ")[2].strip(), **values)
        lines = [line.rpartition(" ## ") for line in text.splitlines()]
        return "".join(f"{key:<{WIDEST}}  # {note}\n" if key else f"{note}\n" for key, _, note in lines)

    def values(self, output_dir: str) -> dict[str, Any]:
        """The config as plain values."""
        return parse_yaml(self.text(output_dir), Path("config.yaml"))


def propose(
    model: ModelFacts, data: DataFacts, choice: Choice, machine: Machine, dtype: Dtype | None = None
) -> Proposal:
    """The largest batch whose estimated need fits; activations are computed again only if one row would not fit."""
    chosen: Dtype = dtype or ("bfloat16" if machine.bfloat16 else "float32")
    has_gpu = machine.gpu is not None
    most = Proposal(model, data, choice, machine, chosen, LARGEST[has_gpu], checkpointing=False)
    sizes = [2**power for power in reversed(range(most.rows.bit_length()))]
    tried = [replace(most, rows=rows, checkpointing=again) for again in (False, True) for rows in sizes]
    fitting = (proposal for proposal in tried if needed_bytes(proposal) <= SHARE[has_gpu] * machine.memory)
    return next(fitting, tried[-1])  # the estimate is coarse: three steps will tell


def default_run(model: str, data: str, changes: Sequence[str] = (), trust_remote_code: bool = False) -> RunConfig:
    """The run that ``smoa init --no-measure --yes`` writes for a model and data, with ``key.key=value`` changes, in the
    first of the folders ``runs/NAME``, ``runs/NAME-2`` and so on without a finished run. With ``method=lora``, or a
    preset of it, the adapter is LoRA's of the same size.

    Raises:
        ConfigError: a change is not valid.
        DataError: there is no such model, or data cannot be read.
    """
    facts = look_at_model(model, trust_remote_code)
    rows = look_at_data(check_data(data), facts, changes, trust_remote_code)
    choice = budget_choice(facts.shapes, facts.parameters, PARAMETERS)
    values = propose(facts, rows, choice, this_machine()).values(output_dir(file_for(data)))
    values["training"]["output_dir"] = str(in_free_folder(check_config(values)).folder)
    apply_overrides(values, [change for change in changes if change.startswith("method=")])
    if find_method(str(values["method"])).peft_type == "lora":
        values["adapter"] = {"target_modules": ALL_LINEAR, "r": choice.lora_r, "lora_alpha": 2 * choice.lora_r}
    apply_overrides(values, list(changes))
    return ConfigText(values, "smoa train").trusting(trust_remote_code).checked()


def file_for(data: str) -> Path:
    """The config's file, NAME.yaml for data called NAME."""
    return Path(f"{Path(data.rstrip('/')).name.partition('.')[0] or 'run'}.yaml")


def needed_bytes(proposal: Proposal) -> int:
    """A coarse estimate of what training takes: weights, adapter, activations and logits, each row at full length.

    A layer keeps about 48 bytes of each hidden and 16 of each intermediate number of a token, with weights of 16 bits
    too, since the adapter computes in float32; if activations are computed again, one layer does, and each keeps its
    input. The loss keeps the logits as they are, in float32, and their gradient.
    """
    model: Any = proposal.model.config.get_text_config()
    size, hidden, layers = BYTES[proposal.dtype], model.hidden_size, model.num_hidden_layers
    sides = 2 if proposal.data.format == "preference" else 1  # the chosen and the rejected answer
    tokens = sides * proposal.rows * proposal.data.max_length
    layer = 48 * hidden + 16 * (getattr(model, "intermediate_size", None) or 4 * hidden)
    kept = layer + size * hidden * layers if proposal.checkpointing else layer * layers
    logits = (size + 8) * model.vocab_size
    weights = size * proposal.model.parameters + ADAPTER_BYTES * proposal.choice.parameters
    return weights + int(tokens * (kept + logits))


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, and bytes at most."""

    seconds: float
    memory: int


class StepClock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The mean time of a step, without the first one, in which memory is claimed and code is compiled."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def measure(proposal: Proposal) -> tuple[Proposal, Measured]:
    """What three steps take; the proposal with a smaller batch if it ran out of memory.

    Raises:
        ConfigError: one row does not fit.
    """
    while True:
        try:
            return proposal, _three_steps(proposal)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)  # frees what the failed steps held
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        proposal = proposal.smaller()
        logger.info("Out of memory; trying again with batches of %d", proposal.rows)


def _three_steps(proposal: Proposal) -> Measured:
    with tempfile.TemporaryDirectory(prefix="smoa-init-") as folder:
        values = proposal.values(folder)
        training = {key: value for key, value in values["training"].items() if key != "num_train_epochs"}
        short = {"max_steps": MEASURED_STEPS, "save_strategy": "no", "logging_steps": MEASURED_STEPS}
        run = load_run(check_config({**values, "training": {**training, **short}}))
        clock = StepClock()
        arguments = run.arguments()
        logger.info("Measuring %d steps", MEASURED_STEPS)
        run.fit(arguments, None, clock)
        return Measured(clock.seconds, peak_memory(arguments.device))


def config_text(file: Path, proposal: Proposal, measured: Measured | None) -> str:
    """The config file: what it is for, how to run it, what it will take, and the commented keys."""
    data = proposal.data
    size = f", {data.tokens:,} tokens in all" if data.tokens else ""
    header = [
        f"Trains an adapter of {proposal.model.name}: {data.train:,} {data.kind} to train on{size}.",
        f"Run it:         smoa train {file}",
        f"Change a value: smoa train {file} training.max_steps=10",
        *(expected(proposal, measured) or ["Not measured: how long a step takes, and how much memory."]),
    ]
    return proposal.text(output_dir(file), header)


def output_dir(file: Path) -> str:
    """Where a run of this config goes."""
    return f"runs/{file.stem}"


def expected(proposal: Proposal, measured: Measured | None) -> list[str]:
    """What the run will take, in two sentences; nothing where nothing was measured."""
    if measured is None:
        return []
    steps, seconds = proposal.all_steps, proposal.all_steps * measured.seconds
    each = f"{measured.seconds:.{1 if measured.seconds < 10 else 0}f}"
    return [
        f"Expected: {steps:,} step{'s' * (steps > 1)} of {each} s each on {proposal.machine.name}, "
        f"{duration(seconds)} in all, and {decimal(measured.memory)} of memory.",
        "Measured on three steps. Scoring held-out data before and after takes time of its own.",
    ]


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
