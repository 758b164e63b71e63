from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smoa_lab.rows.faults import BadRow, Fault
from smoa_lab.rows.formats import Conversation, Example, Format, Passage, Preference, recognise, shape, unrecognised
from smoa_lab.rows.row_files import read_rows
from smoa_lab.rows.turns import Message

EXAMPLES = Path(__file__).parents[4] / "examples" / "data"
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Open?"}
ANSWER = {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}
SYSTEM_TURN, USER_TURN, ANSWER_TURN, OTHER_TURN = (Message(**turn) for turn in (SYSTEM, USER, ANSWER, OTHER))


def shaped(row: dict[str, Any]) -> Example:
    format = recognise(row)
    assert format is not None
    return shape(row, format)


def fault(row: dict[str, Any]) -> Fault:
    with pytest.raises(BadRow) as caught:
        shaped(row)
    assert str(caught.value) == str(caught.value.fault)
    return caught.value.fault


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


def test_a_row_of_no_format_is_told_which_columns_there_are() -> None:
    known = "messages; prompt and completion; chosen and rejected; instruction and output; conversations; text"
    problem = f"found the columns 'prompt', expected those of a format: {known}"
    assert unrecognised({"prompt": "a"}) == Fault(None, problem)


CONVERSATIONS: dict[str, tuple[dict[str, Any], Conversation]] = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, Conversation((SYSTEM_TURN, USER_TURN, ANSWER_TURN))),
    "messages as JSON": ({"messages": json.dumps([USER, ANSWER])}, Conversation((USER_TURN, ANSWER_TURN))),
    "an open end": ({"messages": [USER, ANSWER, USER]}, Conversation((USER_TURN, ANSWER_TURN, USER_TURN))),
    "conversations with roles": ({"conversations": [USER, ANSWER]}, Conversation((USER_TURN, ANSWER_TURN))),
    "a prompt of turns": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        Conversation((SYSTEM_TURN, USER_TURN, ANSWER_TURN), prompt_turns=2),
    ),
    "a prompt of turns as JSON": (
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        Conversation((USER_TURN, ANSWER_TURN), prompt_turns=1),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Open?"}, {"from": "gpt", "value": "Yes.", "markdown": None}]},
        Conversation((USER_TURN, ANSWER_TURN)),
    ),
    "alpaca": ({"instruction": "Open?", "output": "Yes."}, Conversation((USER_TURN, ANSWER_TURN))),
    "alpaca with an empty input": (
        {"instruction": "Open?", "input": " ", "output": "Yes."},
        Conversation((USER_TURN, ANSWER_TURN)),
    ),
    "alpaca with a null input": (
        {"instruction": "Open?", "input": None, "output": "Yes."},
        Conversation((USER_TURN, ANSWER_TURN)),
    ),
    "alpaca with an input": (
        {"instruction": "Translate.", "input": "Ja.", "output": "Yes."},
        Conversation((Message("user", "Translate.\n\nJa."), ANSWER_TURN)),
    ),
}


@pytest.mark.parametrize(("row", "conversation"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_conversation_comes_in_several_formats(row: dict[str, Any], conversation: Conversation) -> None:
    assert shaped(row) == conversation


def test_plain_text_stays_as_it_is() -> None:
    assert shaped({"text": " a\n"}) == Passage(" a\n")
    assert shaped({"prompt": "a ", "completion": " b"}) == Passage(" b", prompt="a ")


def test_a_completion_may_be_json_text() -> None:
    listed = json.dumps([USER])
    assert shaped({"prompt": "Write a message.", "completion": listed}) == Passage(listed, prompt="Write a message.")


PREFERENCES: dict[str, tuple[dict[str, Any], Preference]] = {
    "turns": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        Preference((USER_TURN,), (ANSWER_TURN,), (OTHER_TURN,)),
    ),
    "a shared beginning": (
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
        Preference((SYSTEM_TURN, USER_TURN), (ANSWER_TURN,), (OTHER_TURN,)),
    ),
    "a shared beginning beside its text": (
        {"prompt": "Open?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        Preference((USER_TURN,), (ANSWER_TURN,), (OTHER_TURN,)),
    ),
    "a shared answer": (
        {"chosen": [USER, ANSWER, USER, OTHER], "rejected": [USER, ANSWER, USER, ANSWER]},
        Preference((USER_TURN, ANSWER_TURN, USER_TURN), (OTHER_TURN,), (ANSWER_TURN,)),
    ),
    "turns as JSON": (
        {"prompt": json.dumps([USER]), "chosen": json.dumps([ANSWER]), "rejected": json.dumps([OTHER])},
        Preference((USER_TURN,), (ANSWER_TURN,), (OTHER_TURN,)),
    ),
    "text": ({"prompt": "Open? ", "chosen": "Yes.", "rejected": "No."}, Preference("Open? ", "Yes.", "No.")),
    "text without a prompt": ({"chosen": "Yes.", "rejected": "Yet."}, Preference("", "Yes.", "Yet.")),
    "text with a null prompt": ({"prompt": None, "chosen": "a", "rejected": "b"}, Preference("", "a", "b")),
}


@pytest.mark.parametrize(("row", "preference"), PREFERENCES.values(), ids=PREFERENCES)
def test_a_preference_has_three_parts_of_one_kind(row: dict[str, Any], preference: Preference) -> None:
    assert shaped(row) == preference


def test_a_row_of_another_format_than_the_file_is_a_fault() -> None:
    with pytest.raises(
        BadRow, match="completion: is missing, expected in each row of the format prompt; found 'prompt'"
    ):
        shape({"prompt": "a"}, "prompt")
    with pytest.raises(
        BadRow, match="messages: is missing, expected in each row of the format messages; found nothing"
    ):
        shape({}, "messages")


@pytest.mark.parametrize("column", ["tools", "image", "images", "system", "history"])
def test_a_column_that_would_be_dropped_is_refused_unless_it_is_empty(column: str) -> None:
    row = {"messages": [USER, ANSWER]}
    assert fault({**row, column: ["a"]}).field == column
    for empty in (None, [], ""):
        assert shaped({**row, column: empty}) == Conversation((USER_TURN, ANSWER_TURN))
    assert shaped({"text": "a", column: "b"}) == Passage("a")


@pytest.mark.parametrize("label", [True, False, "True", "false"])
def test_completions_marked_as_good_or_bad_are_refused(label: object) -> None:
    assert fault({"prompt": "a", "completion": "b", "label": label}).field == "label"
    assert shaped({"prompt": "a", "completion": "b", "label": "hours"}) == Passage("b", prompt="a")


def test_other_columns_are_ignored() -> None:
    assert shaped({"id": 3, "text": "a", "source": {"page": 2}}) == Passage("a")


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
    rows = [row for _, row in read_rows(EXAMPLES / name) if not isinstance(row, Fault)]
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
