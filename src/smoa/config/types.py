"""Checks a value against its field's annotation, and describes the annotation in words."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

ONE = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
    NoneType: "null",
}
MANY = {int: "integers", float: "numbers", str: "strings"}


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the annotated type. An int is also a float; a bool is neither."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """The annotated type in words, for an error message."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(in_words(one) for one in inner)
    if origin is Literal:
        return f"{'one of ' if len(inner) > 1 else ''}{', '.join(map(repr, inner))}"
    if origin is list:
        return f"a list of {_plural(inner[0])}"
    if origin is dict:
        return f"a mapping from {_plural(inner[0])} to {_plural(inner[1])}"
    return ONE[hint]


def _plural(hint: Any) -> str:
    return f"lists of {_plural(get_args(hint)[0])}" if get_origin(hint) is list else MANY[hint]


def shortened(value: object) -> str:
    """The value as text, cut after 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
