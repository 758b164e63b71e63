"""What makes a value of SmoaConfig invalid, one rule at a time: each gives the problem in words, or None."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def is_number(value: object) -> bool:
    """True for an int or float that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def int_problem(name: str, value: object, limit: int | None = None) -> str | None:
    """Unless a positive integer, at most `limit`."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= (limit or value):
        return None
    return f"{name}={value!r} must be a positive integer" + (f", at most {limit}" if limit else "")


def positive_problem(name: str, value: object) -> str | None:
    """Unless a positive finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
        return None
    return f"{name}={value!r} must be a positive number"


def choice_problem(name: str, value: object, choices: tuple[object, ...]) -> str | None:
    """Unless one of `choices`."""
    if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        return None
    return f"{name}={value!r} must be one of {', '.join(map(repr, choices))}"


def _all(value: object, rule: Callable[[Any], bool], *containers: type) -> bool:
    return isinstance(value, containers) and all(map(rule, value))  # type: ignore[call-overload]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    return _all(value, _is_text, list, tuple, set, frozenset)


def _is_pattern(value: object) -> bool:
    """A regular expression that Python can read."""
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


def _is_place(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_places(value: object) -> bool:
    return _all(value, _is_place, list, tuple, set, frozenset, range)


def _is_patterns(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_pattern, value))


def _is_token_indices(value: object) -> bool:
    return _is_places(value) or (
        isinstance(value, dict) and all(map(_is_text, value)) and all(map(_is_places, value.values()))
    )


_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "target_modules": (lambda v: _is_names(v) or _is_pattern(v), "a list of names or a regular expression"),
    "exclude_modules": (lambda v: _is_names(v) or _is_pattern(v), "a list of names or a regular expression"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (lambda v: _is_place(v) or _is_places(v), "a layer index or a list of them"),
    "layers_pattern": (lambda v: _is_pattern(v) or _all(v, _is_pattern, list, tuple, set), "one name or a list"),
    "rank_pattern": (_is_patterns, "a mapping from names or regular expressions to integers"),
    "alpha_pattern": (_is_patterns, "a mapping from names or regular expressions to numbers"),
    "fan_in_fan_out": (lambda v: isinstance(v, bool), "true or false"),
    "inference_mode": (lambda v: isinstance(v, bool), "true or false"),
    "trainable_token_indices": (_is_token_indices, "a list of token indices, or such lists by module name"),
    "base_model_name_or_path": (_is_text, "a name or path"),
    "revision": (_is_text, "a name"),
    "auto_mapping": (lambda v: isinstance(v, dict), "a mapping"),
    "settings_digest": (_is_text, "what was written when the adapter was saved"),
    "weights_digest": (_is_text, "what was written when the adapter was saved"),
}
_NEVER_NONE = {"rank_pattern", "alpha_pattern", "fan_in_fan_out", "inference_mode"}


def type_problems(config: object) -> list[str]:
    """Values of a type that no rule below could even be put to."""
    problems = []
    for name, (fits, wanted) in _TYPES.items():
        value = getattr(config, name)
        if not (value is None and name not in _NEVER_NONE) and not fits(value):
            problems.append(f"{name}={_short(value)} must be {wanted}")
    return problems


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
