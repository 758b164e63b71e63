from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from smoa_lab.data.files import read_rows
from smoa_lab.data.formats import (
    SHAREGPT_ROLES,
    BadRow,
    Format,
    excerpt,
    in_words,
    names,
    parsed,
    read_turns,
    recognise,
    shape,
)
from smoa_lab.data.rows import Message, Row

EXAMPLES = Path(__file__).parents[4] / "examples" / "data"
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Open?"}
ANSWER = {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}
SYSTEM_TURN, USER_TURN, ANSWER_TURN, OTHER_TURN = (Message(**turn) for turn in (SYSTEM, USER, ANSWER, OTHER))


def shaped(row: dict[str, Any]) -> Row:
    format = recognise(row)
    assert format is not None
    return shape(row, format)


def fault(row: dict[str, Any]) -> BadRow:
    with pytest.raises(BadRow) as caught:
        shaped(row)
    return caught.value


FORMATS: dict[str, tuple[dict[str, Any], Format | None]] = {
    "messages": ({"messages": []}, "messages"),
    "a prompt beside messages": ({"prompt": "a", "messages": []}, "messages"),
    "null": ({"messages": None}, "messages"),
    "prompt": ({"prompt": "a", "completion": "b"}, "prompt"),
    "preference": ({"chosen": "a", "rejected": "b"}, "preference"),
    "preference with a prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "preference"),
    "alpaca": ({"instruction": "a", "output": "b"}, "alpaca"),
    "alpaca with its text": ({"instruction": "a", "input": "", "output": "b", "text": "c"}, "alpaca"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt"),
    "sharegpt without turns": ({"conversations": []}, "sharegpt"),
    "conversations with roles": ({"conversations": [USER]}, "messages"),
    "conversations with roles as JSON": ({"conversations": json.dumps([USER])}, "messages"),
    "text": ({"id": 1, "text": "a"}, "text"),
    "a prompt alone": ({"prompt": "a"}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("row", "format"), FORMATS.values(), ids=FORMATS)
def test_a_format_is_recognised_by_its_columns(row: dict[str, Any], format: Format | None) -> None:
    assert recognise(row) == format


CONVERSATIONS: dict[str, tuple[dict[str, Any], Row]] = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, Row((), (SYSTEM_TURN, USER_TURN, ANSWER_TURN))),
    "messages as JSON": ({"messages": json.dumps([USER, ANSWER])}, Row((), (USER_TURN, ANSWER_TURN))),
    "an open end": ({"messages": [USER, ANSWER, USER]}, Row((), (USER_TURN, ANSWER_TURN, USER_TURN))),
    "conversations with roles": ({"conversations": [USER, ANSWER]}, Row((), (USER_TURN, ANSWER_TURN))),
    "a prompt of turns": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        Row(
            (
                SYSTEM_TURN,
                USER_TURN,
            ),
            (ANSWER_TURN,),
        ),
    ),
    "a prompt of turns as JSON": (
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        Row((USER_TURN,), (ANSWER_TURN,)),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Open?"}, {"from": "gpt", "value": "Yes.", "markdown": None}]},
        Row((), (USER_TURN, ANSWER_TURN)),
    ),
    "alpaca": ({"instruction": "Open?", "output": "Yes."}, Row((), (USER_TURN, ANSWER_TURN))),
    "alpaca with an empty input": (
        {"instruction": "Open?", "input": " ", "output": "Yes."},
        Row((), (USER_TURN, ANSWER_TURN)),
    ),
    "alpaca with a null input": (
        {"instruction": "Open?", "input": None, "output": "Yes."},
        Row((), (USER_TURN, ANSWER_TURN)),
    ),
    "alpaca with an input": (
        {"instruction": "Translate.", "input": "Ja.", "output": "Yes."},
        Row((), (Message("user", "Translate.\n\nJa."), ANSWER_TURN)),
    ),
}


@pytest.mark.parametrize(("row", "conversation"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_conversation_comes_in_several_formats(row: dict[str, Any], conversation: Row) -> None:
    assert shaped(row) == conversation


def test_plain_text_stays_as_it_is() -> None:
    assert shaped({"text": " a\n"}) == Row("", " a\n")
    assert shaped({"prompt": "a ", "completion": " b"}) == Row("a ", " b")
    assert shaped({"id": 3, "text": "a", "source": {"page": 2}}) == Row("", "a")
    listed = json.dumps([USER])
    assert shaped({"prompt": "Write a message.", "completion": listed}) == Row("Write a message.", listed)


PREFERENCES: dict[str, tuple[dict[str, Any], Row]] = {
    "turns": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        Row((USER_TURN,), (ANSWER_TURN,), (OTHER_TURN,)),
    ),
    "a shared beginning": (
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
        Row((SYSTEM_TURN, USER_TURN), (ANSWER_TURN,), (OTHER_TURN,)),
    ),
    "a shared beginning beside its text": (
        {"prompt": "Open?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        Row((USER_TURN,), (ANSWER_TURN,), (OTHER_TURN,)),
    ),
    "a shared answer": (
        {"chosen": [USER, ANSWER, USER, OTHER], "rejected": [USER, ANSWER, USER, ANSWER]},
        Row((USER_TURN, ANSWER_TURN, USER_TURN), (OTHER_TURN,), (ANSWER_TURN,)),
    ),
    "turns as JSON": (
        {"prompt": json.dumps([USER]), "chosen": json.dumps([ANSWER]), "rejected": json.dumps([OTHER])},
        Row((USER_TURN,), (ANSWER_TURN,), (OTHER_TURN,)),
    ),
    "text": ({"prompt": "Open? ", "chosen": "Yes.", "rejected": "No."}, Row("Open? ", "Yes.", "No.")),
    "text without a prompt": ({"chosen": "Yes.", "rejected": "Yet."}, Row("", "Yes.", "Yet.")),
    "text with a null prompt": ({"prompt": None, "chosen": "a", "rejected": "b"}, Row("", "a", "b")),
}


@pytest.mark.parametrize(("row", "preference"), PREFERENCES.values(), ids=PREFERENCES)
def test_a_preference_has_three_parts_of_one_kind(row: dict[str, Any], preference: Row) -> None:
    assert shaped(row) == preference


def test_a_column_that_would_be_dropped_is_refused_unless_it_is_empty() -> None:
    row = {"messages": [USER, ANSWER]}
    for column in ("tools", "image", "images", "system", "history"):
        assert fault({**row, column: ["a"]}).field == column
        for empty in (None, [], ""):
            assert shaped({**row, column: empty}) == Row((), (USER_TURN, ANSWER_TURN))
        assert shaped({"text": "a", column: "b"}) == Row("", "a")


@pytest.mark.parametrize("label", [True, False, "True", "false"])
def test_completions_marked_as_good_or_bad_are_refused(label: object) -> None:
    assert fault({"prompt": "a", "completion": "b", "label": label}).field == "label"
    assert shaped({"prompt": "a", "completion": "b", "label": "hours"}) == Row("a", "b")


EXAMPLE_FORMATS: dict[str, Format] = {
    "alpaca.csv": "alpaca",
    "alpaca.json": "alpaca",
    "messages.jsonl": "messages",
    "messages.parquet": "messages",
    "preference.jsonl": "preference",
    "prompt-completion-chat.jsonl": "prompt",
    "prompt-completion.jsonl": "prompt",
    "sharegpt.json": "sharegpt",
    "text.jsonl": "text",
}


@pytest.mark.parametrize("name", EXAMPLE_FORMATS)
def test_the_example_of_each_format_is_read_whole(name: str) -> None:
    rows = [row for _, row in read_rows(EXAMPLES / name) if not isinstance(row, BadRow)]
    assert [recognise(row) for row in rows] == [EXAMPLE_FORMATS[name]] * 3
    assert len({shaped(row) for row in rows}) == 3


def test_the_page_of_the_examples_names_each_of_them() -> None:
    files = {file.name for file in EXAMPLES.iterdir()} - {"README.md"}
    assert files == EXAMPLE_FORMATS.keys()
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in files if f"[{name}]({name})" not in page] == []


def test_one_conversation_is_the_same_in_every_format_of_the_examples() -> None:
    of = {
        name: [shaped(row) for _, row in read_rows(EXAMPLES / name) if isinstance(row, dict)]
        for name in EXAMPLE_FORMATS
    }
    assert of["messages.jsonl"] == of["messages.parquet"] == of["sharegpt.json"]
    assert of["alpaca.json"] == of["alpaca.csv"]


def test_turns_are_read_from_json_text_and_parts_of_text_and_have_their_paths() -> None:
    read = [("prompt[0]", USER_TURN), ("prompt[1]", ANSWER_TURN)]
    parts = [{"type": "text", "text": "Op", "image": None}, {"type": "text", "text": "en?"}]
    for turns in ([USER, ANSWER], json.dumps([USER, ANSWER]), [{"role": "user", "content": parts}, ANSWER]):
        assert read_turns(turns, "prompt") == read


@pytest.mark.parametrize("role", SHAREGPT_ROLES)
def test_every_name_of_a_role_in_sharegpt_is_known(role: str) -> None:
    [(_, message)] = read_turns([{"from": role, "value": "x"}], "a", ("from", "value"))
    assert message == Message(SHAREGPT_ROLES[role], "x")


def test_keys_that_change_nothing_are_ignored() -> None:
    more = {"name": "Nadia", "tool_calls": None, "function_call": None, "thinking": "", "weight": 1}
    assert read_turns([{**USER, **more}], "a") == read_turns([USER], "a")
    assert read_turns([{**USER, "weight": None}], "a") == read_turns([USER], "a")


def test_what_is_not_json_holds_nothing() -> None:
    assert parsed("[1]") == [1]
    assert parsed("{'a': 1}") is None
    assert parsed("[" * 100_000) is None
    assert parsed("[" + "1" * 5000 + "]") is None


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
    assert in_words(value) == words


def test_a_long_text_and_many_names_are_cut() -> None:
    assert excerpt("a" * 40) == repr("a" * 40)
    assert excerpt("a" * 41) == repr("a" * 40) + "…"
    assert names(map(str, range(10))) == ", ".join(repr(str(n)) for n in range(10))
    assert names(map(str, range(11))).endswith("'9', …")
