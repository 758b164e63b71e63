"""Checks a run's config and finds all its problems at once, each with the nearest valid name."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from transformers import TrainingArguments

from smoa.errors import ConfigError
from smoa_lab.basics.names import nearest
from smoa_lab.config.methods import FROM_DATA, find_method

UNWANTED = {
    "resume_from_checkpoint": "smoa resumes an interrupted run by itself: leave it out, and run the same command again",
    "save_only_model": "leaves out what an interrupted run needs to go on as it was; leave it out",
}
"""Keys of training that a run can't have."""
Problem = tuple[tuple[str, ...], str]
"""A key's path, by which its line is found, and what is wrong with it."""
LEAST = dict.fromkeys(
    ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1
) | {"dataloader_num_workers": 0, "seed": 0, "neftune_noise_alpha": 0}
"""Numbers below which the Trainer would fail in the middle of a run, or take whole epochs."""
MOST = {"seed": 2**32 - 1, "data_seed": 2**63 - 1}
"""Numbers above which it would."""
INITS = re.compile(r"pissa_niter_\d+")
"""Values of ``init_lora_weights`` that PEFT takes and its types don't list."""
CHECKED = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())


def block_problems(model: type[BaseModel], values: dict[str, Any]) -> Iterable[Problem]:
    """Unknown and missing keys of our own blocks, and values of the wrong type."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        for problem in error.errors():
            yield tuple(map(str, problem["loc"])), str(problem["msg"]).removeprefix("Value error, ")


def method_problems(values: dict[str, Any]) -> Iterable[Problem]:
    """Of the method and ``adapter``."""
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
        init = str(adapter.get("init_lora_weights")).lower()
        if init in FROM_DATA:
            found = f"{init} starts from the model's activations or gradients on data, which runs here don't collect"
            problems = [(("adapter", "init_lora_weights"), f"{found}; leave it out, or take pissa or olora")]
        if adapter.get("task_type") not in (None, "CAUSAL_LM"):
            problems.append((("adapter", "task_type"), "runs train causal language models; leave it out"))
        decided = method.preset.keys() & adapter.keys()
        problems += [(("adapter", key), f"is decided by method {name}; leave it out") for key in decided]
        yield from problems
        if not problems:
            try:
                method.peft_config(adapter)
            except ConfigError as error:  # the rules that the PEFT config checks itself
                yield ("adapter",), str(error)


def training_problems(training: Any, training_class: type[TrainingArguments]) -> Iterable[Problem]:
    """Of ``training``, which is for ``training_class``."""
    if not isinstance(training, dict):
        return
    problems = list(_dataclass_problems("training", training_class, training))
    problems += [(("training", key), reason) for key, reason in UNWANTED.items() if training.get(key)]
    for key, least in LEAST.items():
        value = training.get(key)
        if (
            isinstance(value, int | float) and value < least and (key, value) != ("max_steps", -1)
        ):  # which is its default
            problems.append((("training", key), f"should be at least {least}; got {value}"))
    for key, most in MOST.items():
        if isinstance(value := training.get(key), int) and value > most:
            problems.append((("training", key), f"should be at most {most}; got {value}"))
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
    fields = {field.name: field for field in dataclasses.fields(target) if field.init}
    model = _model_of(target)  # type: ignore[arg-type]  # a class is hashable
    for key, value in values.items():
        path, wrong = (block, str(key)), None
        choices = [str(choice) for choice in fields[key].metadata.get("choices", ())] if key in fields else []
        # A trainer would take the text "no" for yes. But 16.0 may be 16, a list a tuple, a block a class.
        try:
            model.model_validate({key: value}, strict=not isinstance(value, float | list | dict))
        except ValidationError as error:  # of a union one for each of its types
            wrong = str(error.errors()[0]["msg"]).removeprefix("Input ")
        if key not in fields:
            yield path, f"{target.__name__} has no such key{nearest(str(key), fields)}"
        elif wrong and not (key == "init_lora_weights" and INITS.fullmatch(str(value))):
            yield path, f"{wrong}; got {value!r}"
        elif value not in (None, fields[key].default) and choices and str(value) not in choices:
            yield path, f"there is no {value!r}{nearest(str(value), choices)}"


@cache
def _model_of(target: Any) -> type[BaseModel]:
    hints = typing.get_type_hints(target)
    fields: dict[str, Any] = {field.name: (hints[field.name], None) for field in dataclasses.fields(target)}
    return create_model(target.__name__, __config__=CHECKED, **fields)
