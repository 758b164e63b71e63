"""Looks at a model and at data before a config is written for them: sizes, lengths, format, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smoa_lab.basics.extras import require
from smoa_lab.basics.positions import positions_of
from smoa_lab.config.run import DataSection, ModelSection, TaskSection, check_config
from smoa_lab.data.files import source_values
from smoa_lab.data.tasks import TASKS, find_task, task_needs
from smoa_lab.models.base_models import empty_model, load_tokenizer
from smoa_lab.runs.budget_choices import ALL_LINEAR, Shapes, shapes_of
from smoa_lab.training.loaded_run import sources, trainable_rows_of

STEP = 64
"""Tokens: a row is cut at a multiple of it."""


@dataclass(frozen=True)
class ModelFacts:
    """``parameters`` of the whole model; ``shapes`` of its linear layers but the output; ``context``: how many tokens
    it takes, if that is limited."""

    name: str
    parameters: int
    shapes: Shapes
    context: int | None
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


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


def look_at_model(name: str) -> ModelFacts:
    """Read a model's sizes from its config alone; no weights are read.

    Raises:
        DataError: there is no such model.
    """
    empty = empty_model(ModelSection(name=name))
    config: Any = empty.config.get_text_config()
    return ModelFacts(
        name,
        sum(parameter.numel() for parameter in empty.parameters()),
        shapes_of(empty, (ALL_LINEAR,), name),
        positions_of(empty.config),
        config.num_hidden_layers,
        config.hidden_size,
        getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        config.vocab_size,
    )


def check_place(place: str) -> str:
    """``place`` itself; raises DataError if it can be known without reading that nothing is there."""
    if place not in TASKS:
        for source in sources(check_config({"model": {"name": ""}, "data": source_values(place)}, place).rows):
            source.check()
    return place


def look_at_data(place: str, model: ModelFacts) -> DataFacts:
    """Count what ``place`` holds: a task's name, a file, a folder, or a data set of the Hub. Its rows are all read.

    Raises:
        DataError: rows cannot be read, or some are bad, as `smoa train` would say.
    """
    return _questions(place) if place in TASKS else _rows(place, model)


def _questions(name: str) -> DataFacts:
    require(task_needs({name: find_task(name)}))
    data = DataSection(tasks=[name])
    return DataFacts({"tasks": [name]}, len(data.select().train), TaskSection().max_length)


def _rows(place: str, model: ModelFacts) -> DataFacts:
    tokenizer = load_tokenizer(ModelSection(name=model.name))
    lent = None if tokenizer.chat_template else "alpaca"
    data = {**source_values(place), "chat_template": lent}
    training = {"max_length": model.context}
    config = check_config({"model": {"name": model.name}, "data": data, "training": training}, place)
    _, rows = trainable_rows_of(config, tokenizer)
    account = rows.account
    template = {"chat_template": lent} if lent and not rows.rows("train", 1)[0].is_text else {}
    return DataFacts(
        {**source_values(place), "format": account["format"], **template, "test_part": config.rows.test_part},
        account["parts"]["train"],
        rounded_length(account["tokens"]["p99"], model.context),
        account["format"],
        account["tokens"]["total"],
    )


def rounded_length(longest: int, context: int | None) -> int:
    """The next multiple of 64, or what the model takes if that is less."""
    length = -(-longest // STEP) * STEP
    return length if context is None else min(length, context)
