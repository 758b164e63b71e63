from __future__ import annotations

import json

import pytest

from smoa_lab.rows.faults import BadRow
from smoa_lab.rows.turns import (
    SHAREGPT_ROLES,
    Message,
    check_answered,
    check_order,
    check_text,
    parsed,
    read_turns,
)

SYSTEM, USER, ANSWER = ({"role": role, "content": f"By the {role}."} for role in ("system", "user", "assistant"))


def test_each_turn_has_its_path() -> None:
    assert read_turns([USER, ANSWER], "prompt") == [
        ("prompt[0]", Message("user", "By the user.")),
        ("prompt[1]", Message("assistant", "By the assistant.")),
    ]


def test_json_text_is_read_as_the_list_that_it_holds() -> None:
    assert read_turns(json.dumps([USER]), "a") == read_turns([USER], "a")


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "By ", "image": None}, {"type": "text", "text": "the user."}]
    assert read_turns([{"role": "user", "content": parts}], "a") == read_turns([USER], "a")


@pytest.mark.parametrize("role", SHAREGPT_ROLES)
def test_every_name_of_a_role_in_sharegpt_is_known(role: str) -> None:
    [(_, message)] = read_turns([{"from": role, "value": "x"}], "a", ("from", "value"))
    assert message == Message(SHAREGPT_ROLES[role], "x")


def test_keys_that_change_nothing_are_ignored() -> None:
    more = {"name": "Nadia", "tool_calls": None, "function_call": None, "thinking": "", "weight": 1}
    assert read_turns([{**USER, **more}], "a") == read_turns([USER], "a")
    assert read_turns([{**USER, "weight": None}], "a") == read_turns([USER], "a")


@pytest.mark.parametrize("turns", [[USER, ANSWER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER, ANSWER]])
def test_turns_alternate(turns: list[dict[str, str]]) -> None:
    check_order(read_turns(turns, "a"))


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([ANSWER], r"a\[0\]: assistant comes first; expected user and assistant in alternation, user first"),
        ([SYSTEM, ANSWER], r"a\[1\]: assistant follows system; expected user and assistant in alternation"),
        ([USER, USER], r"a\[1\]: user follows user; expected user and assistant in alternation"),
        ([USER, ANSWER, ANSWER], r"a\[2\]: assistant follows assistant; expected user and assistant"),
        ([USER, SYSTEM], r"a\[1\]: system follows user; expected system only as the first turn"),
        ([SYSTEM, SYSTEM], r"a\[1\]: system follows system; expected system only as the first turn"),
    ],
)
def test_a_turn_out_of_order_is_named(turns: list[dict[str, str]], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        check_order(read_turns(turns, "a"))


def test_turns_without_an_answer_are_named() -> None:
    check_answered(read_turns([ANSWER], "a"), "a")
    with pytest.raises(BadRow, match="a: has no assistant turn; expected at least one, since only these are trained"):
        check_answered(read_turns([SYSTEM, USER], "a"), "a")


def test_text_is_given_back_as_it_is() -> None:
    assert check_text(" a\n", "a") == " a\n"


def test_what_is_not_json_holds_nothing() -> None:
    assert parsed("[1]") == [1]
    assert parsed("{'a': 1}") is None
    assert parsed("[" * 100_000) is None
    assert parsed("[" + "1" * 5000 + "]") is None
