"""Checks a run's config and finds all its problems at once, each with the nearest valid name."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from transformers import TrainingArguments
from transformers.quantizers.auto import AutoQuantizationConfig

from smoa.errors import ConfigError, DataError, nearest
from smoa_lab.basics.extras import install
from smoa_lab.basics.foreign import foreign_warnings_ignored
from smoa_lab.config.methods import METHODS, Method
from smoa_lab.data.tasks import find_task

RANGES: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps"),
            *("eval_accumulation_steps", "save_total_limit", "max_length"),
        ),
        Field(ge=1, strict=True),
    ),
    **dict.fromkeys(("num_train_epochs", "save_steps"), Field(gt=0)),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"),
            *("dataloader_num_workers", "logging_steps", "eval_steps"),
        ),
        Field(ge=0),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Field(ge=0, lt=1)),
    **dict.fromkeys(("seed", "data_seed"), Field(ge=0, lt=2**32, strict=True)),
}
"""Training values that the trainer would fail at, or take for something else. Its own default is always good."""
RESUMES = "smoa resumes an interrupted run by itself: leave it out, and run the same command again"
QUANTIZATION = "model.options.quantization_config"
MISPLACED = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), f"belongs one level deeper, in {QUANTIZATION}"),
    **dict.fromkeys(("dtype", "torch_dtype"), "set model.dtype instead"),
    "trust_remote_code": "set model.trust_remote_code instead",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with one key; ``path`` is the key's, so that its line can be found."""

    path: tuple[str, ...]
    text: str


def listed(problems: Sequence[str]) -> str:
    """``2 problems``, then one a line."""
    return "\n  ".join([f"{len(problems)} problem{'s' if len(problems) > 1 else ''}", *problems])


def all_problems(
    model: type[BaseModel], values: dict[str, Any], training_class: type[TrainingArguments]
) -> list[Problem]:
    """Problems of our own blocks, of the method, the tasks, ``adapter`` and ``training``, which is for
    ``training_class``."""
    return [
        *block_problems(model, values),
        *_quantization_problems(values),
        *_task_problems(values),
        *_method_problems(values),
        *_training_problems(values.get("training"), training_class),
    ]


def block_problems(model: type[BaseModel], values: dict[str, Any]) -> Iterable[Problem]:
    """Unknown and missing keys of our own blocks, and values of the wrong type."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        for problem in error.errors():
            place = tuple(map(str, problem["loc"]))
            path = place if _choices_of(model, place[0]) is None else (place[0], *place[2:])
            yield Problem(path, f"{'.'.join(path)}: {_wording(model, place, dict(problem))}")


def _choices_of(block: Any, key: str) -> dict[str, Any] | None:
    """The blocks that a key may hold, by the names that pydantic puts into the places of problems."""
    field = block.model_fields.get(key)
    if field is None or field.discriminator is None:
        return None
    return {tag.tag: chosen for chosen, tag in map(typing.get_args, typing.get_args(field.annotation))}


def _wording(model: type[BaseModel], path: tuple[str, ...], problem: dict[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key{nearest(path[-1], _keys_beside(model, path))}"
    if problem["type"] == "missing":
        return "is missing"
    got = problem["input"]
    hint = nearest(str(got), _literals(problem)) if problem["type"] == "literal_error" else ""
    return f"{problem['msg'].removeprefix('Input ')}; got {got!r}{hint}"


def _keys_beside(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The valid keys of the block in which ``path`` ends."""
    block: Any = model
    for key in path[:-1]:
        if isinstance(block, dict):
            block = block[key]
        elif _is_block(block) and (choices := _choices_of(block, key)) is not None:
            block = choices
        else:
            inside = typing.get_args(block)[-1] if _holds_blocks(block) else block.model_fields[key].annotation
            options = typing.get_args(inside) if isinstance(inside, types.UnionType) else (inside,)
            block = next((one for one in options if _is_block(one) or _holds_blocks(one)), None)
        if block is None:
            return []
    return list(block.model_fields) if _is_block(block) else []


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _holds_blocks(annotation: Any) -> bool:
    """Whether it is a dictionary or a list of blocks."""
    return typing.get_origin(annotation) in (dict, list) and _is_block(typing.get_args(annotation)[-1])


def _literals(found: dict[str, Any]) -> list[str]:
    return [part.strip(" '") for part in found["ctx"]["expected"].replace(" or ", ",").split(",")]


def _task_problems(values: dict[str, Any]) -> Iterable[Problem]:
    data = values.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("tasks"), list):
        return
    files = data.get("files")
    for name in map(str, data["tasks"]):
        if isinstance(files, dict) and name in files:
            continue
        try:
            find_task(name)
        except DataError as error:
            yield Problem(("data", "tasks"), str(error))


def _method_problems(values: dict[str, Any]) -> Iterable[Problem]:
    name, adapter = str(values.get("method", "smoa")), values.get("adapter", {})
    if name not in METHODS:
        yield Problem(("method",), f"method: there is no method {name!r}{nearest(name, METHODS)}")
    elif isinstance(adapter, dict):
        yield from _adapter_problems(name, METHODS[name], adapter)


def _adapter_problems(name: str, method: Method, adapter: dict[str, Any]) -> Iterable[Problem]:
    if method.config_class is None:
        if adapter:
            yield Problem(("adapter",), f"adapter: method {name} trains all weights and takes no adapter keys")
        return
    problems = list(_dataclass_problems("adapter", method.config_class, adapter))
    problems += [
        Problem(("adapter", key), f"adapter.{key}: is decided by method {name}; leave it out")
        for key in method.preset.keys() & adapter.keys()
    ]
    yield from problems or _construction_problems(method, adapter)


def _construction_problems(method: Method, adapter: dict[str, Any]) -> Iterable[Problem]:
    """The rules that the PEFT config checks itself."""
    try:
        method.peft_config(adapter)
    except (ConfigError, ValueError, TypeError) as error:
        yield Problem(("adapter",), f"adapter: {error}")


def _training_problems(training: Any, training_class: type[TrainingArguments]) -> Iterable[Problem]:
    if not isinstance(training, dict):
        return
    problems = list(_dataclass_problems("training", training_class, training))
    if training.get("resume_from_checkpoint") is not None:
        problems.append(Problem(("training", "resume_from_checkpoint"), f"training.resume_from_checkpoint: {RESUMES}"))
    if training.get("output_dir", "") is None:
        problems.append(Problem(("training", "output_dir"), "training.output_dir: is empty; name a folder"))
    if problems:
        yield from problems
        return
    try:
        with foreign_warnings_ignored():
            training_class(**training)
    except (ValueError, TypeError, ImportError) as error:
        yield Problem(("training",), f"training: {error}")


def _dataclass_problems(block: str, target: type[Any], values: dict[str, Any]) -> Iterable[Problem]:
    """Unknown keys, and values of the wrong type or out of range, for the dataclass to which a block is handed."""
    valid = {field.name: field for field in dataclasses.fields(target) if field.init}
    hints = typing.get_type_hints(target)
    for key, value in values.items():
        path = (block, str(key))
        if key not in valid:
            yield Problem(path, f"{block}.{key}: {target.__name__} has no such key{nearest(str(key), valid)}")
            continue
        allowed = [str(one) for one in valid[key].metadata.get("choices", ())]
        if (reason := _type_problem(hints[key], value)) is not None:
            yield Problem(path, f"{block}.{key}: {reason}; got {value!r}")
        elif value is None or value == valid[key].default:
            continue
        elif allowed and str(value) not in allowed:
            yield Problem(path, f"{block}.{key}: there is no {value!r}{nearest(str(value), allowed)}")
        elif block == "training" and (reason := _type_problem(Annotated[hints[key], RANGES.get(key)], value)):
            yield Problem(path, f"{block}.{key}: {reason}; got {value!r}")


def _type_problem(hint: Any, value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "should be a finite number"
    try:
        found = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None  # a type that pydantic cannot check is left to the class itself
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Input ")
    if isinstance(value, str) and isinstance(found, bool | int | float):  # a trainer would take the text "no" for yes
        return f"should be {'true or false' if isinstance(found, bool) else 'a number'}, and no text"
    return None


def _quantization_problems(values: dict[str, Any]) -> Iterable[Problem]:
    """The problems of the quantization that a run's config asks for."""
    model = values.get("model")
    options = model.get("options") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(options, dict):
        return
    for key in options.keys() & MISPLACED.keys():
        yield Problem(("model", "options", key), f"model.options.{key}: {MISPLACED[key]}")
    if "quantization_config" not in options:
        return
    yield from (
        Problem(("model", "options", "quantization_config", *path), text) for path, text in _quantization_block(options)
    )
    if str(model.get("name")).endswith(".gguf"):
        text = f"{QUANTIZATION}: a GGUF file is dequantized when loaded; name a model in float32 or bfloat16"
        yield Problem(("model", "options", "quantization_config"), text)
    if values.get("method") == "full":
        yield Problem(
            ("method",), "method: full trains the weights, and quantized weights cannot be trained; choose an adapter"
        )


def _quantization_block(options: dict[str, Any]) -> Iterable[tuple[tuple[str, ...], str]]:
    wanted = options["quantization_config"]
    if not isinstance(wanted, dict):
        yield (), f"{QUANTIZATION}: must be a block of keys, such as load_in_4bit: true; got {wanted!r}"
        return
    try:
        known = {"quant_method", *inspect.signature(type(AutoQuantizationConfig.from_dict(wanted))).parameters}
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        hint = f"; {install('quantized')}" if isinstance(error, ImportError) else ""
        yield (), f"{QUANTIZATION}: {error}{hint}"
        return
    for key in wanted.keys() - known:
        yield (key,), f"{QUANTIZATION}.{key}: there is no such key{nearest(key, known)}"
