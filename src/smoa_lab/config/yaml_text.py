"""YAML as people write it: ``1e-3`` is a number, ``no`` a word, a key given twice an error; keys know their lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from smoa.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, in which ``1e-3`` is a string and ``no`` is false; the last of equal keys wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# A table of its own, so that PyYAML's loader stays as it is; without YAML 1.1's many spellings of a boolean.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, file: Path) -> dict[str, Any]:
    """The mapping that ``text`` holds; raises ConfigError with the line where it is no YAML or no mapping."""
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold the blocks model, method, adapter, data, task and training")
    return values


def parse_value(text: str) -> Any:
    """One YAML value, as in an override on the command line."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line, from 1, of every key path in ``text``."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            here = (*path, str(key.value))
            lines[here] = key.start_mark.line + 1
            walk(value, here)

    walk(yaml.compose(text, _Loader), ())
    return lines


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> None:
    """Lay ``key.key=value`` texts over ``values``, in place; raises ConfigError where one is not of that form."""
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: an override is written key.key=value, e.g. training.learning_rate=1e-3")
        *parents, last = key.split(".")
        block = values
        for parent in parents:
            block = block.setdefault(parent, {})
            if not isinstance(block, dict):
                raise ConfigError(f"{override!r}: {parent} is no block of keys")
        block[last] = parse_value(value)
