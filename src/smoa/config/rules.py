"""Rules for the values of SmoaConfig, alone and together: types, ranges, syntax, and combinations."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from smoa.maths.blocks import MAX_BLOCKS

Bias = Literal["none", "all", "smoa_only"]
Rule = tuple[Callable[[Any], bool], str]

COUNT: Rule = (lambda n: n >= 1, "a positive integer")
BLOCKS: Rule = (lambda n: 1 <= n <= MAX_BLOCKS, f"a positive integer, at most {MAX_BLOCKS}")
POSITIVE: Rule = (lambda x: 0 < x <= sys.float_info.max, "a positive number")
SHARE: Rule = (lambda p: 0 <= p < 1, "a number in [0, 1)")
INDEX: Rule = (lambda n: n >= 0, "an index from 0 on")
RULES: dict[str, Rule] = {
    "r": COUNT,
    "rank_pattern": COUNT,
    "num_blocks": BLOCKS,
    "num_blocks_pattern": BLOCKS,
    "block_ranks": (lambda n: n >= 0, "a non-negative integer"),
    "alpha": POSITIVE,
    "alpha_pattern": POSITIVE,
    "lora_alpha": POSITIVE,
    "smoa_dropout": SHARE,
    "lora_dropout": SHARE,
    "layers_to_transform": INDEX,
    "trainable_token_indices": INDEX,
}
"""The range of a value, or of each value in a list or mapping."""
EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern")
PATTERNS = ("rank_pattern", "alpha_pattern", "num_blocks_pattern")
CHECKED_BY_PEFT = ("task_type", "peft_type", "peft_version")


def config_problems(config: Any) -> list[str]:
    """All problems of single values or, if there are none, of combinations."""
    hints = _hints(config.__class__)
    names = [field.name for field in fields(config) if field.name not in CHECKED_BY_PEFT]
    problems = [problem for name in names for problem in value_problems(name, getattr(config, name), hints[name])]
    return problems or list(_combination_problems(config))


@cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def value_problems(name: str, value: Any, hint: Any) -> Iterator[str]:
    """The problems of one value: its type or, if that is right, its range and syntax."""
    if not fits(value, hint):
        yield f"{name}={shortened(value)} must be {in_words(hint)}"
        return
    if name in RULES:
        holds, wanted = RULES[name]
        yield from (f"{place}={entry!r} must be {wanted}" for place, entry in _entries(name, value) if not holds(entry))
    for expression in _expressions(name, value):
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError):
            yield f"{name}: {shortened(expression)} is not a regular expression"


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The numbers in a value and their places."""
    if isinstance(value, (list, Mapping)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _entries(f"{name}[{key!r}]", inner)
    elif value is not None:
        yield name, value


def _expressions(name: str, value: Any) -> list[str]:
    if name in PATTERNS:
        return [*value, *(rf"(.*\.)?({key})$" for key in value)]  # alone, and as PEFT uses it
    if name not in EXPRESSIONS or value is None:
        return []
    if isinstance(value, str):
        return [value]
    return list(value) if name == "layers_pattern" else []  # lists of modules are plain names


def _combination_problems(config: Any) -> Iterator[str]:
    if config.layers_pattern and config.layers_to_transform is None:
        yield f"layers_pattern={config.layers_pattern!r} has no effect without layers_to_transform"
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        yield (
            f"layers_to_transform={config.layers_to_transform!r} needs target_modules to be a list of names, "
            f"not the regular expression {config.target_modules!r}"
        )
    if config.block_ranks is None:
        return
    for name in ("rank_pattern", "num_blocks_pattern"):
        if getattr(config, name):
            yield f"block_ranks and {name} can't be combined: block_ranks fits one r and one K; drop one of them"
            return
    ranks, total = config.block_ranks, sum(config.block_ranks)
    if len(ranks) != config.num_blocks:
        yield f"block_ranks={ranks} has {len(ranks)} entries; give one for each of num_blocks={config.num_blocks}"
    elif total != config.r:
        yield f"block_ranks={ranks} sums to {total}; the ranks of all blocks must sum to r={config.r}"


SINGULAR = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
    NoneType: "null",
}
PLURAL = {int: "integers", float: "numbers", str: "strings"}


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the annotated type. An int is also a float; a bool is neither."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """The annotated type in words, for an error message."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, inner))
    if origin is Literal:
        return f"{'one of ' if len(inner) > 1 else ''}{', '.join(map(repr, inner))}"
    if origin is list:
        return f"a list of {_plural(inner[0])}"
    if origin is dict:
        return f"a mapping from {_plural(inner[0])} to {_plural(inner[1])}"
    return SINGULAR[hint]


def _plural(hint: Any) -> str:
    return f"lists of {_plural(get_args(hint)[0])}" if get_origin(hint) is list else PLURAL[hint]


def shortened(value: object) -> str:
    """The value as text, cut after 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
