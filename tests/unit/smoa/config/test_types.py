from __future__ import annotations

from typing import Any, Literal, Optional

import pytest

from smoa.config import fits, in_words, shortened


@pytest.mark.parametrize(
    ("value", "hint", "fitting"),
    [
        (1, int, True),
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (True, float, False),
        (1, bool, False),
        (None, int | None, True),
        (None, Optional[str], True),  # noqa: UP045  (as PEFT writes it)
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (1, Literal[True], False),
        ([1, 2], list[int], True),
        ([1, True], list[int], False),
        ((1, 2), list[int], False),
        ({"a": [1]}, dict[str, list[int]], True),
        ({1: [1]}, dict[str, list[int]], False),
        ({}, dict, True),
    ],
)
def test_a_value_fits_its_annotation_or_does_not(value: object, hint: Any, fitting: bool) -> None:
    assert fits(value, hint) == fitting


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "an integer"),
        (float | None, "a number or null"),
        (Literal["a", "b"], "one of 'a', 'b'"),
        (bool | Literal["a"], "true or false or 'a'"),
        (list[str] | str, "a list of strings or a string"),
        (dict[str, list[int]], "a mapping from strings to lists of integers"),
    ],
)
def test_an_annotation_in_words(hint: Any, words: str) -> None:
    assert in_words(hint) == words


def test_a_long_value_is_cut() -> None:
    assert shortened("a" * 200) == "'" + "a" * 99 + "…"
