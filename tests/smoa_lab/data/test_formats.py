import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from smoa_lab.data.formats import BadRow, Format, read_turns, recognize, shape
from smoa_lab.data.row import Message, Row
from smoa_lab.data.sources import read_rows

EXAMPLES = Path(__file__).parents[3] / "examples" / "data"
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Open?"}
ANSWER = {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}
SYSTEM_TURN, USER_TURN, ANSWER_TURN, OTHER_TURN = (Message(**turn) for turn in (SYSTEM, USER, ANSWER, OTHER))


def shaped(row: dict[str, Any]) -> Row:
    return shape(row, recognize(row))


def fault(row: dict[str, Any]) -> BadRow:
    with pytest.raises(BadRow) as caught:
        shaped(row)
    return caught.value


FORMATS: dict[str, tuple[dict[str, Any], Format | None]] = {
    "a prompt beside messages": ({"prompt": "a", "messages": []}, "messages"),
    "choices": ({"prompt": "a", "choices": [], "label": 0, "completion": "b"}, "choices"),
    "alpaca with its text": ({"instruction": "a", "input": "", "output": "b", "text": "c"}, "alpaca"),
    "sharegpt without turns": ({"conversations": []}, "sharegpt"),
    "conversations with roles as JSON": ({"conversations": json.dumps([USER])}, "messages"),
    "a prompt alone": ({"prompt": "a"}, None),
}


@pytest.mark.parametrize(("row", "format"), FORMATS.values(), ids=FORMATS)
def test_a_format_is_recognized_by_its_columns(row: dict[str, Any], format: Format | None) -> None:
    if format is None:
        with pytest.raises(BadRow, match="columns"):
            recognize(row)
    else:
        assert recognize(row) == format


CONVERSATIONS: dict[str, tuple[dict[str, Any], Row]] = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, Row((), (SYSTEM_TURN, USER_TURN, ANSWER_TURN))),
    "messages as JSON": ({"messages": json.dumps([USER, ANSWER])}, Row((), (USER_TURN, ANSWER_TURN))),
    "an open end": ({"messages": [USER, ANSWER, USER]}, Row((), (USER_TURN, ANSWER_TURN, USER_TURN))),
    "conversations with roles": ({"conversations": [USER, ANSWER]}, Row((), (USER_TURN, ANSWER_TURN))),
    "a prompt of turns": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        Row((SYSTEM_TURN, USER_TURN), (ANSWER_TURN,)),
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


def test_a_preference_is_refused_with_the_trainer_that_takes_it() -> None:
    with pytest.raises(BadRow, match=r"found a preference, .*DPOTrainer with SmoaConfig"):
        recognize({"prompt": "Open?", "chosen": "Yes.", "rejected": "No."})


QUESTION = {"prompt": " Open? ", "choices": ["Yes.", " No."], "label": 1}
CHOSEN = Row((USER_TURN,), (OTHER_TURN,), choices=("Yes.", "No."), label=1)
LISTED: dict[str, Any] = {
    "a number": {},
    "a text": {"label": "No. "},
    "as CSV has them": {"choices": '["Yes.", "No."]', "label": "1"},
    "turns": {"prompt": [USER]},
    "an id": {"id": "7", "source": None, "part": "mine"},
}


@pytest.mark.parametrize("changes", LISTED.values(), ids=LISTED)
def test_a_row_with_choices_is_a_conversation_that_the_right_one_answers(changes: dict[str, Any]) -> None:
    assert shaped(QUESTION | changes) == CHOSEN


@pytest.mark.parametrize(
    ("choices", "label", "expected"),
    [
        (["2", "3", "1"], 1, 1),  # beside texts a JSON number is the choice's number alone
        (["2", "3", "1"], "0", 0),  # the text of none
        (["2", "3", "1"], "3", 1),  # the number of none
        (["0", "1"], "1", 1),  # both ways the same
        (["x", "y", "y"], "y", 1),
        ([0.5, 2], "2", 1),
        (["x", "y"], 1.0, 1),  # as in a Parquet column in which one is missing
        *((["x", "y"], label, "expected the number of a choice") for label in (2, -1, 1.5, "z", " ", None, True, [1])),
    ],
)
def test_a_label_is_the_number_of_a_choice_or_its_text_and_refused_where_it_is_neither(
    choices: list[Any], label: object, expected: int | str
) -> None:
    row = {"prompt": "Which?", "choices": choices, "label": label}
    if isinstance(expected, int):
        assert shaped(row).label == expected
    else:
        assert fault(row).field == "label"
        assert expected in fault(row).problem


def test_a_row_of_any_format_may_name_its_part() -> None:
    for row in ({"text": "a"}, QUESTION, {"messages": [USER, ANSWER]}):
        assert shaped(row | {"part": "test"}).part == "test"
        for other in (None, "red", ["test"], 3):
            assert shaped(row | {"part": other}).part is None
        for near in ("dev", "Test"):
            assert fault(row | {"part": near}).field == "part"


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
    "prompt-completion-chat.jsonl": "prompt",
    "prompt-completion.jsonl": "prompt",
    "sharegpt.json": "sharegpt",
    "text.jsonl": "text",
}


@pytest.mark.parametrize("name", EXAMPLE_FORMATS)
def test_the_example_of_each_format_is_read_whole(name: str) -> None:
    rows = [row for _, row in read_rows(EXAMPLES / name) if not isinstance(row, BadRow)]
    assert [recognize(row) for row in rows] == [EXAMPLE_FORMATS[name]] * 3
    assert len({shaped(row) for row in rows}) == 3


def test_turns_are_read_from_json_text_and_parts_of_text_and_have_their_paths() -> None:
    read = [("prompt[0]", USER_TURN), ("prompt[1]", ANSWER_TURN)]
    parts = [{"type": "text", "text": "Op", "image": None}, {"type": "text", "text": "en?"}]
    for turns in ([USER, ANSWER], json.dumps([USER, ANSWER]), [{"role": "user", "content": parts}, ANSWER]):
        assert read_turns(turns, "prompt") == read


CHAT = [USER, ANSWER]
TURNS: list[tuple[Any, str, str]] = [
    (None, "", "found None, expected a list"),
    ("Hello.", "", "json.dumps"),
    (USER, "", "expected a list"),
    ([], "", "at least one"),
    (["Hi", "Hello"], "[0]", "found 'Hi'"),
    ([USER, None], "[1]", "expected an object"),
    ([{"content": "Hi"}], "[0].role", "missing"),
    ([USER, {"role": "assistant"}], "[1].content", "missing"),
    ([{**USER, "role": None}], "[0].role", "user, assistant"),
    ([{**USER, "role": "User"}], "[0].role", "found 'User'"),
    ([*CHAT, {"role": "tool", "content": "4"}], "[2].role", "only text.* SFTTrainer"),
    ([USER, {"role": "assistant", "tool_calls": [{"id": 1}]}], "[1].tool_calls", "SFTTrainer"),
    ([USER, {**ANSWER, "function_call": {"name": "f"}}], "[1].function_call", "SFTTrainer"),
    ([USER, {**ANSWER, "thinking": "Hm."}], "[1].thinking", "content"),
    ([USER, {**ANSWER, "content": 10**400}], "[1].content", "expected text"),
    ([USER, {**ANSWER, "content": " \n"}], "[1].content", "blank"),
    ([{**USER, "content": [{"type": "image"}]}, ANSWER], "[0].content[0]", "SFTTrainer"),
    ([{**USER, "content": [{"type": "text", "text": None}]}], "[0].content[0]", '"type": "text"'),
    ([{**USER, "content": [{"type": "text", "text": ""}]}], "[0].content", "blank"),
    ([USER, USER, ANSWER], "[1]", "alternation"),
    ([ANSWER, USER], "[0]", "user first"),
    ([*CHAT, SYSTEM], "[2]", "first turn"),
    ([USER], "", "no assistant turn"),
]
"""Lists of messages, the place in them, and the rule or the remedy."""
SHAREGPT: list[tuple[Any, str, str]] = [
    ([], "", "at least one"),
    ([{"from": "human"}], "[0].value", "missing"),
    ([{"from": "narrator", "value": "x"}], "[0].from", "human, user, gpt"),
    ([{"from": "human", "value": 3}], "[0].value", "expected text"),
]
COLUMNS: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, None, "messages; prompt and choices and label; prompt and completion"),
    ({"Text": "a"}, None, "'Text'"),
    ({"text": None}, "text", "expected text"),
    ({"instruction": "a", "input": 0, "output": "b"}, "input", "expected text"),
    ({"prompt": "", "completion": "Yes."}, "prompt", "blank"),
    ({"prompt": "Open?", "completion": [ANSWER]}, "prompt", "list"),
    ({"prompt": [USER], "completion": "Yes."}, "completion", "list"),
    ({"prompt": CHAT, "completion": [USER]}, "completion", "no assistant turn"),
    ({"prompt": [USER], "completion": CHAT}, "completion[0]", "alternation"),
    ({**QUESTION, "prompt": " "}, "prompt", "blank"),
    ({**QUESTION, "prompt": CHAT}, "prompt[1]", "assistant.*user"),
    ({**QUESTION, "choices": "Yes.|No."}, "choices", "in CSV as JSON"),
    ({**QUESTION, "choices": ["Yes."]}, "choices", "two texts or more"),
    ({**QUESTION, "choices": "[" * 100_000}, "choices", "expected a list"),
    ({**QUESTION, "choices": ["Yes.", " "]}, "choices[1]", "blank"),
    ({**QUESTION, "choices": ["Yes.", None, "No."]}, "choices[1]", "found None, expected text"),
    ({**QUESTION, "choices": [0.5, math.nan]}, "choices[1]", "found nan"),
    ({**QUESTION, "choices": [b"a", b"b"]}, "choices[0]", "expected text"),
    ({**QUESTION, "tools": ["a"]}, "tools", "SFTTrainer"),
]
BAD = [({"messages": value}, f"messages{place}", words) for value, place, words in TURNS]
BAD += [({"conversations": value}, f"conversations{place}", words) for value, place, words in SHAREGPT]


@pytest.mark.parametrize(("row", "field", "words"), [*BAD, *COLUMNS])
def test_a_bad_row_is_named_by_its_field_with_what_is_expected(
    row: dict[str, Any], field: str | None, words: str
) -> None:
    error = fault(row)
    assert error.field == field
    assert re.search(words, error.problem)
    assert len(str(error)) < 400
    assert str(error).isprintable()


def test_a_row_of_another_format_than_that_of_the_file_is_bad() -> None:
    with pytest.raises(BadRow, match="text: is missing"):
        shape({"messages": CHAT}, "text")
