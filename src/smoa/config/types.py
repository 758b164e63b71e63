"""Of what type each value of SmoaConfig must be, and which regular expressions are let through."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from re import _constants, _parser  # type: ignore[attr-defined]  # Python has no public way to look into an expression
from typing import Any

MAX_REPEATS = 6
"""Repetitions of variable length in one regular expression, as `.*`."""
MAX_WAYS = 10_000
"""Product of the numbers of alternatives, as in `(up|down)`, an optional part being two."""
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


def _all(value: object, rule: Callable[[Any], bool], *containers: type) -> bool:
    return isinstance(value, containers) and all(map(rule, value))  # type: ignore[call-overload]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    return _all(value, _is_text, list, tuple, set, frozenset)


def _is_pattern(value: object) -> bool:
    """A regular expression that Python can read, and answer in a reasonable time whatever the name."""
    try:
        return isinstance(value, str) and bool(re.compile(value)) and _is_quick(_parser.parse(value))
    except (re.error, RecursionError, OverflowError):
        return False


def _is_quick(tree: Any) -> bool:
    """Nothing of variable length is repeated, which takes exponential time, and little of it stands in a row: n
    repetitions take the n-th power of a name's length."""
    choices = list(_choices(tree))
    unlimited = [ways for ways, _ in choices if ways is None]
    ways = math.prod(ways for ways, _ in choices if ways is not None)
    return not any(repeated for _, repeated in choices) and len(unlimited) <= MAX_REPEATS and ways <= MAX_WAYS


def _choices(node: Any, repeated: bool = False) -> Iterator[tuple[int | None, bool]]:
    """Wherever a match can go on in several ways: in how many (None: the text decides), and whether repeatedly."""
    if isinstance(node, tuple) and len(node) == 2 and node[0] in _REPEATS:
        least, most, inner = node[1]
        if least < most:
            yield (2 if most == 1 else None), repeated
        yield from _choices(inner, repeated or most > 1)
        return
    if isinstance(node, tuple) and len(node) == 2 and node[0] == _constants.BRANCH:
        yield len(node[1][1]), repeated
    if isinstance(node, (tuple, list, _parser.SubPattern)):
        for part in node:
            yield from _choices(part, repeated)


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


_EXPRESSION = (
    f"a regular expression with at most {MAX_REPEATS} repetitions such as .*, none within another nor around "
    f"alternatives, and at most {MAX_WAYS} combinations of those"
)
_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "target_modules": (lambda v: _is_names(v) or _is_pattern(v), f"a list of names or {_EXPRESSION}"),
    "exclude_modules": (lambda v: _is_names(v) or _is_pattern(v), f"a list of names or {_EXPRESSION}"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (lambda v: _is_place(v) or _is_places(v), "a layer index or a list of them"),
    "layers_pattern": (lambda v: _is_pattern(v) or _all(v, _is_pattern, list, tuple, set), "one name or a list"),
    "rank_pattern": (_is_patterns, f"a mapping to integers from names, each {_EXPRESSION}"),
    "num_blocks_pattern": (_is_patterns, f"a mapping to integers from names, each {_EXPRESSION}"),
    "alpha_pattern": (_is_patterns, f"a mapping to numbers from names, each {_EXPRESSION}"),
    "normalized_alpha": (lambda v: isinstance(v, dict) and all(map(_is_text, v)), "a mapping from module names"),
    "normalize_anchor": (lambda v: isinstance(v, bool), "true or false"),
    "spectrum_blocks": (lambda v: isinstance(v, dict) and all(map(_is_text, v)), "a mapping from module names"),
    "blocks_from_spectrum": (lambda v: isinstance(v, bool), "true or false"),
    "fan_in_fan_out": (lambda v: isinstance(v, bool), "true or false"),
    "inference_mode": (lambda v: isinstance(v, bool), "true or false"),
    "trainable_token_indices": (_is_token_indices, "a list of token indices, or such lists by module name"),
    "base_model_name_or_path": (_is_text, "a name or path"),
    "revision": (_is_text, "a name"),
    "auto_mapping": (lambda v: isinstance(v, dict), "a mapping"),
    "settings_digest": (_is_text, "what was written when the adapter was saved"),
    "weights_digest": (_is_text, "what was written when the adapter was saved"),
}
_COLLECTIONS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
)
_NEVER_NONE = {
    "rank_pattern",
    "alpha_pattern",
    "normalized_alpha",
    "normalize_anchor",
    "num_blocks_pattern",
    "spectrum_blocks",
    "blocks_from_spectrum",
    "fan_in_fan_out",
    "inference_mode",
}


def type_problems(config: object) -> list[str]:
    """Values of a type that no rule below could even be put to."""
    problems = []
    for name, (fits, wanted) in _TYPES.items():
        value = getattr(config, name)
        if not (value is None and name not in _NEVER_NONE) and not fits(value):
            problems.append(f"{name}={_short(value)} must be {wanted}")
    return problems


def make_savable(config: object) -> None:
    """Put lists in the place of the collections that JSON lacks."""
    for name in _COLLECTIONS:
        setattr(config, name, _as_json(getattr(config, name)))


def _as_json(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return list(value) if isinstance(value, range) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
