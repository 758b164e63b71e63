"""Checks blocks of a config by pydantic and finds all problems at once, each with its place; an unknown key has the
nearest one that is known."""

from __future__ import annotations

import dataclasses
import reprlib
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from smoa.errors import ConfigError
from smoa_lab.basics.values import nearest
from smoa_lab.config.methods import find_method

Problem = tuple[tuple[str, ...], str]
"""A key's path, and what is wrong with it."""
Block = dict[str, Any]


def refuse(place: str, problems: Iterable[Problem]) -> None:
    """Raise ConfigError with all problems of the config in a place, if there are any."""
    texts = [f"{'.'.join(path)}: {reason}" if path else reason for path, reason in problems]
    if texts:
        raise ConfigError("\n  ".join([f"{place}: {len(texts)} problem{'s' * (len(texts) > 1)}", *texts]))


def block_problems(model: type[BaseModel], values: Block, place: tuple[str, ...] = ()) -> Iterator[Problem]:
    """What pydantic finds in a block; of a union's types the first one's error."""
    seen = set()
    try:
        model.model_validate(values)
    except ValidationError as error:
        for problem in error.errors():
            loc, kind, reason = problem["loc"], problem["type"], str(problem["msg"]).removeprefix("Value error, ")
            path = loc if kind == "missing" else _known(loc, values)
            if kind == "extra_forbidden":
                reason = f"unknown key{nearest(str(loc[-1]), _keys_at(model, path[:-1]))}"
            elif kind != "missing" and not isinstance(problem["input"], dict):
                reason += f"; got {reprlib.repr(problem['input'])}"
            if path not in seen:
                yield (*place, *map(str, path)), reason
            seen.add(path)


def _known(loc: tuple[int | str, ...], values: Any) -> tuple[int | str, ...]:
    """A problem's place in the values, without the names of types with which it may end."""
    path = []
    for key in loc:
        try:
            values = values[key]
        except (LookupError, TypeError):
            break
        path.append(key)
    return tuple(path)


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the block at a path within a model's."""
    for key in path:
        kind = getattr(model.model_fields.get(str(key)), "annotation", None)
        inside = typing.get_args(kind) or (kind,)
        model = next((each for each in inside if isinstance(each, type) and issubclass(each, BaseModel)), model)
    return list(model.model_fields)


def method_problems(values: Block) -> Iterator[Problem]:
    """Of the method and ``adapter``."""
    name, adapter = str(values.get("method", "smoa")), values.get("adapter", {})
    try:
        method = find_method(name)
        if method.config_class is None and adapter:
            raise ConfigError(f"method: {name} trains all weights; leave adapter out")
    except ConfigError as error:
        yield ("method",), str(error).removeprefix("method: ")
        return
    if method.config_class is None or not isinstance(adapter, dict):
        return
    target: Any = method.config_class
    problems = list(block_problems(model_of(target), adapter, ("adapter",)))
    decided = method.preset.keys() & adapter.keys()
    problems += [(("adapter", key), f"is decided by method {name}; leave it out") for key in decided]
    yield from problems
    if not problems:
        try:
            method.peft_config(adapter)
        except ConfigError as error:  # the rules that the PEFT config checks itself
            yield ("adapter",), str(error)


@cache
def model_of(target: Any) -> type[BaseModel]:
    """A pydantic model of a dataclass to which a block is handed."""
    rules = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=(), extra="forbid")
    hints = typing.get_type_hints(target)
    fields: Any = {each.name: (hints[each.name], None) for each in dataclasses.fields(target) if each.init}
    return create_model(target.__name__, __config__=rules, **fields)


def converted(target: Any, values: Block) -> Block:
    """A block's values, numbers and yes or no as the dataclass has them: of ``bf16: "no"`` the text would be true."""
    model = model_of(target).model_validate(values)
    found = {key: getattr(model, key) for key in values}
    return {key: new if isinstance(new := found[key], bool | int | float) else values[key] for key in values}
