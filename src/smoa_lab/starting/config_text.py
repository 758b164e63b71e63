"""Writes a proposal as YAML, with a comment for every line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.filesize import decimal

from smoa_lab.config.yaml_text import key_lines, to_yaml
from smoa_lab.starting.machine import Machine
from smoa_lab.starting.measure_steps import Measured
from smoa_lab.starting.proposal import BATCH, EPOCHS, Proposal

WIDEST = 44
"""Characters of a line before its comment, where lines are not longer."""
LISTED = "one in each line"
"""Beside an entry of a list."""


def config_text(file: Path, proposal: Proposal, machine: Machine, measured: Measured | None) -> str:
    """The config file: what it is for, how to run it, what it will take, and the commented keys."""
    plain = to_yaml(proposal.values(output_dir(file)))
    comments, paths = _comments(proposal, machine), {line: path for path, line in key_lines(plain).items()}
    lines = _header(file, proposal, machine, measured)
    for number, line in enumerate(plain.splitlines(), start=1):
        path = paths.get(number)
        if path is not None and len(path) == 1:
            lines.append("")
        comment = LISTED if path is None else comments.get(".".join(path))
        lines.append(f"{line:<{WIDEST}}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def output_dir(file: Path) -> str:
    """Where a run of this config goes."""
    return f"runs/{file.stem}"


def expected(proposal: Proposal, machine: Machine, measured: Measured | None) -> list[str]:
    """What the run will take, in two sentences; nothing where nothing was measured."""
    if measured is None:
        return []
    seconds, digits = proposal.all_steps * measured.seconds, 1 if measured.seconds < 10 else 0
    steps = f"{proposal.all_steps:,} step{'s' * (proposal.all_steps > 1)}"
    each = f"{measured.seconds:.{digits}f}"
    return [
        f"Expected: {steps} of {each} s each on {machine.name}, "
        f"{duration(seconds)} in all, and {decimal(measured.memory)} of memory.",
        "Measured on three steps. Scoring held-out data before and after takes time of its own.",
    ]


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _header(file: Path, proposal: Proposal, machine: Machine, measured: Measured | None) -> list[str]:
    data = proposal.data
    what = f"{data.train:,} {data.kind} to train on"
    size = f", {data.tokens:,} tokens in all" if data.tokens else ""
    texts = [
        f"Trains an adapter of {proposal.model.name}: {what}{size}.",
        f"Run it:         smoa train {file}",
        f"Change a value: smoa train {file} training.max_steps=10",
        *(expected(proposal, machine, measured) or ["Not measured: how long a step takes, and how much memory."]),
    ]
    return [f"# {text}" for text in texts]


def _comments(proposal: Proposal, machine: Machine) -> dict[str, str]:
    """The comment of each key that has one, by the key's path."""
    return {**_model_comments(proposal, machine), **_data_comments(proposal), **_training_comments(proposal)}


def _model_comments(proposal: Proposal, machine: Machine) -> dict[str, str]:
    choice, has = proposal.choice, "has" if machine.bfloat16 else "lacks"
    size = f"{choice.parameters:,} parameters, {choice.percent:g} % of the model"
    return {
        "model": "the base model, whose weights stay as they are",
        "model.name": "a Hub id, a folder, a .gguf file, or a model of the package index",
        "model.dtype": f"of its weights; {machine.name} {has} instructions for bfloat16",
        "method": "or lora, dora, …, which have keys of their own under adapter",
        "adapter": "what is trained",
        "adapter.target_modules": "every linear layer but the output; or a list such as [q_proj, v_proj]",
        "adapter.num_blocks": "a larger one gives more rank on fewer entries of each weight",
        "adapter.r": f"{size}, as LoRA with r = {choice.lora_r}",
        "adapter.alpha": "strength of the update: twice r, so that LoRA's learning rates suit",
    }


def _data_comments(proposal: Proposal) -> dict[str, str]:
    return {
        "data": "what is learned; `smoa data check` shows examples" if proposal.data.format else "what is learned",
        "data.train": "a file, or a folder of files",
        "data.hub": "a data set of the Hub",
        "data.hub.name": "its id; config: and split: choose a part of it",
        "data.tasks": "names from `smoa data list`",
        "data.format": "of the rows, as their columns say",
        "data.chat_template": "the model has no template for conversations; this one suits every base model",
        "data.test_part": "share of the rows that is held out, and scored before and after",
        "task": "how questions are put",
        "task.max_length": "tokens of prompt and answer; a longer prompt is cut at its start",
    }


def _training_comments(proposal: Proposal) -> dict[str, str]:
    again = "activations are computed again: slower, but less memory" if proposal.checkpointing else "true saves memory"
    longest = (
        "the model takes no more" if proposal.data.max_length == proposal.model.context else "99 of 100 are shorter"
    )
    per_epochs = f"{EPOCHS} times all rows would be {proposal.steps_of_epochs:,} steps"
    return {
        "training": "passed to transformers' trainer, any of whose keys may stand here",
        "training.output_dir": "gets adapter, scores, samples and log",
        "training.num_train_epochs": f"times that all {proposal.data.kind} are seen: {proposal.all_steps:,} steps",
        "training.max_steps": f"as many as the time allows; {per_epochs}",
        "training.per_device_train_batch_size": f"{proposal.data.kind} computed at once: more take more memory",
        "training.gradient_accumulation_steps": f"batches in a step, which learns from {BATCH} {proposal.data.kind}",
        "training.max_length": f"tokens at which a row is cut: {longest}",
        "training.gradient_checkpointing": again,
        "training.learning_rate": "by the size of the model; `smoa tune` finds a better one",
        "training.logging_steps": "steps between two lines of the log",
        "training.seed": "the same seed draws the same batches",
    }


def plain_report(file: Path, proposal: Proposal, measured: Measured | None) -> dict[str, Any]:
    """What ``smoa init --json`` prints: the file, its values, and what was measured."""
    report: dict[str, Any] = {"file": str(file), "config": proposal.values(output_dir(file))}
    took = {"seconds_per_step": measured.seconds, "peak_memory_bytes": measured.memory} if measured else None
    return {**report, "steps": proposal.all_steps, "measured": took}
