"""Rules for the values of SmoaConfig, alone and together."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_type_hints

from smoa.config.types import fits, in_words, shortened
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
    found = [problem for name in names for problem in value_problems(name, getattr(config, name), hints[name])]
    return found or list(_combination_problems(config))


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
        yield from (f"{at}={found!r} must be {wanted}" for at, found in _entries(name, value) if not holds(found))
    for expression in _expressions(name, value):
        if not _compiles(expression):
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


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _combination_problems(config: Any) -> Iterator[str]:
    if config.layers_pattern and config.layers_to_transform is None:
        yield f"layers_pattern={config.layers_pattern!r} has no effect without layers_to_transform"
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        yield (
            f"layers_to_transform={config.layers_to_transform!r} needs target_modules to be a list of names, "
            f"not the regular expression {config.target_modules!r}"
        )
    if config.block_ranks is not None:
        yield from _block_rank_problems(config)


def _block_rank_problems(config: Any) -> Iterator[str]:
    for name in ("rank_pattern", "num_blocks_pattern"):
        if getattr(config, name):
            yield f"block_ranks and {name} can't be combined: block_ranks fits one r and one K; drop one of them"
            return
    ranks, total = config.block_ranks, sum(config.block_ranks)
    if len(ranks) != config.num_blocks:
        yield f"block_ranks={ranks} has {len(ranks)} entries; give one for each of num_blocks={config.num_blocks}"
    elif total != config.r:
        yield f"block_ranks={ranks} sums to {total}; the ranks of all blocks must sum to r={config.r}"
