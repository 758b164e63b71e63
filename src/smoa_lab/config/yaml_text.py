"""Reads and writes YAML 1.2: ``1e-3`` is a number, ``no`` a word, a repeated key an error."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from smoa.errors import ConfigError


def _yaml() -> Any:
    """Plain Python values; the pure loader, since libyaml's follows YAML 1.1."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 10_000  # characters: a long path is not spread over several lines
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def parse_yaml(text: str, file: Path) -> dict[str, Any]:
    """The mapping in ``text``; raises ConfigError, with the line, if it is not YAML or not a mapping."""
    try:
        values = _yaml().load(text)
    except (YAMLError, ValueError) as error:  # a ValueError of a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must contain blocks of keys, such as `smoa init` writes")
    return values


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a file, with ``key.key=value`` texts laid over it."""
    file = Path(path)
    values = parse_yaml(file.read_text(encoding="utf-8"), file)
    apply_overrides(values, overrides)
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """The mapping as YAML, in its order."""
    text = io.StringIO()
    _yaml().dump(values, text)
    return text.getvalue()


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply ``key.key=value`` texts to ``values``, in place; raises ConfigError if one is not of that form."""
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: write an override as key.key=value, e.g. training.learning_rate=1e-3")
        *parents, last = key.split(".")
        block = values
        for parent in parents:
            block = block.setdefault(parent, {})
            if not isinstance(block, dict):
                raise ConfigError(f"{override!r}: {parent} is not a block of keys")
        try:
            block[last] = _yaml().load(value)
        except (YAMLError, ValueError):
            block[last] = value
