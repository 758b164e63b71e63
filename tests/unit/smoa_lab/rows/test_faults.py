from __future__ import annotations

import pickle
from datetime import date
from typing import Any

import pytest

from smoa.errors import DataError, SmoaError
from smoa_lab.rows.faults import BadRow, Fault, bad, excerpt, found, names


def test_a_fault_names_its_field_if_it_has_one() -> None:
    assert str(Fault("a[0].b", "is blank")) == "a[0].b: is blank"
    assert str(Fault(None, "is not JSON")) == "is not JSON"


def test_a_bad_row_is_a_data_error_that_carries_the_fault() -> None:
    error = bad("text", "is blank")
    assert isinstance(error, BadRow | DataError | SmoaError)
    assert (error.fault, str(error)) == (Fault("text", "is blank"), "text: is blank")
    assert pickle.loads(pickle.dumps(error)).fault == error.fault


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "true"),
        (3, "the number 3"),
        (1.5, "the number 1.5"),
        (float("nan"), "the number nan"),
        (10**400, "a large number"),
        ("a\n", r"'a\n'"),
        ("\ud83d", r"'\ud83d'"),
        ([1, 2], "a list of 2"),
        ((1, 2), "a list of 2"),
        ({"a": 1, "b": 2}, "an object with 'a', 'b'"),
        ({}, "an object with no keys"),
        (date(2026, 1, 1), "a value of the type date"),
    ],
)
def test_a_value_is_described_in_words(value: Any, words: str) -> None:
    assert found(value) == words


def test_a_long_text_and_many_names_are_cut() -> None:
    assert excerpt("a" * 40) == repr("a" * 40)
    assert excerpt("a" * 41) == repr("a" * 40) + "…"
    assert names(map(str, range(10))) == ", ".join(repr(str(n)) for n in range(10))
    assert names(map(str, range(11))).endswith("'9', …")
