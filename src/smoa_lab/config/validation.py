"""Checks a run's config and finds all its problems at once, each with the nearest valid name."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from transformers import TrainingArguments
from transformers.quantizers.auto import AutoQuantizationConfig

from smoa.errors import ConfigError, nearest
from smoa_lab.config.methods import find_method

RESUMES = "smoa resumes an interrupted run by itself: leave it out, and run the same command again"
Problem = tuple[tuple[str, ...], str]
"""A key's path, by which its line is found, and what is wrong with it."""
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())


def all_problems(
    model: type[BaseModel], values: dict[str, Any], training_class: type[TrainingArguments]
) -> list[Problem]:
    """Problems of our own blocks, of the method, ``adapter`` and ``training``, which is for ``training_class``."""
    return [
        *block_problems(model, values),
        *_quantization_problems(values.get("model")),
        *_method_problems(values),
        *_training_problems(values.get("training"), training_class),
    ]


def block_problems(model: type[BaseModel], values: dict[str, Any]) -> Iterable[Problem]:
    """Unknown and missing keys of our own blocks, and values of the wrong type."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        for problem in error.errors():
            yield tuple(map(str, problem["loc"])), str(problem["msg"]).removeprefix("Value error, ")


def _method_problems(values: dict[str, Any]) -> Iterable[Problem]:
    name, adapter = str(values.get("method", "smoa")), values.get("adapter", {})
    try:
        method = find_method(name)
        config_class = method.config_class
    except ConfigError as error:
        yield ("method",), str(error).removeprefix("method: ")
        return
    if config_class is None:
        if adapter:
            yield ("adapter",), f"method {name} trains all weights and takes no adapter keys"
    elif isinstance(adapter, dict):
        problems = list(_dataclass_problems("adapter", config_class, adapter))
        decided = method.preset.keys() & adapter.keys()
        problems += [(("adapter", key), f"is decided by method {name}; leave it out") for key in decided]
        yield from problems
        if not problems:
            try:
                method.peft_config(adapter)
            except ConfigError as error:  # the rules that the PEFT config checks itself
                yield ("adapter",), str(error)


def _training_problems(training: Any, training_class: type[TrainingArguments]) -> Iterable[Problem]:
    if not isinstance(training, dict):
        return
    problems = list(_dataclass_problems("training", training_class, training))
    if training.get("resume_from_checkpoint") is not None:
        problems.append((("training", "resume_from_checkpoint"), RESUMES))
    steps = training.get("max_steps")
    if isinstance(steps, int) and steps < 1 and steps != -1:  # the Trainer would take whole epochs
        problems.append((("training", "max_steps"), f"should be at least 1; got {steps}"))
    if not training.get("output_dir", "runs"):
        problems.append((("training", "output_dir"), "is empty; name a folder"))
    yield from problems
    if not problems:
        try:
            training_class(**training)
        except (ValueError, TypeError, ImportError) as error:
            yield ("training",), str(error)


def _dataclass_problems(block: str, target: type[Any], values: dict[str, Any]) -> Iterable[Problem]:
    """Unknown keys, and values of the wrong type, for the dataclass to which a block is handed."""
    fields, wrong = {field.name: field for field in dataclasses.fields(target) if field.init}, dict[str, str]()
    try:
        _model_of(target).model_validate(values)  # type: ignore[arg-type]
    except ValidationError as error:
        for problem in error.errors():  # of a union one for each of its types
            wrong.setdefault(str(problem["loc"][0]), str(problem["msg"]).removeprefix("Input "))
    for key, value in values.items():
        path = (block, str(key))
        choices = [str(choice) for choice in fields[key].metadata.get("choices", ())] if key in fields else []
        if key not in fields:
            yield path, f"{target.__name__} has no such key{nearest(str(key), fields)}"
        elif key in wrong:
            yield path, f"{wrong[key]}; got {value!r}"
        elif value not in (None, fields[key].default) and choices and str(value) not in choices:
            yield path, f"there is no {value!r}{nearest(str(value), choices)}"


@cache
def _model_of(target: Any) -> type[BaseModel]:
    """The dataclass as a model, whose types are strict: a trainer would take the text "no" for yes."""
    hints = typing.get_type_hints(target)
    fields: dict[str, Any] = {field.name: (hints[field.name], None) for field in dataclasses.fields(target)}
    return create_model(target.__name__, __config__=STRICT, **fields)


def _quantization_problems(model: Any) -> Iterable[Problem]:
    """What is wrong with the quantization that a run's model asks for; of unknown keys transformers would only warn."""
    options, place = (
        model.get("options") if isinstance(model, dict) else None,
        ("model", "options", "quantization_config"),
    )
    if not isinstance(options, dict) or place[2] not in options:
        return
    wanted = options[place[2]]
    try:
        known = {"quant_method", *inspect.signature(type(AutoQuantizationConfig.from_dict(wanted))).parameters}
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        yield place, f"{error}; give a block of keys, such as load_in_4bit: true"
        return
    for key in wanted.keys() - known:
        yield (*place, key), f"there is no such key{nearest(key, known)}"
