"""Conversations become records: who is held out, what is shown, what is left out."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.data.sources.dialogue import TEST_SHARE, read_chitchat


def talk(*texts: str, speakers: str = "ab") -> dict[str, Any]:
    """A conversation of one message a turn."""
    return {"messages": [[{"sender": speakers[i % len(speakers)], "text": text}] for i, text in enumerate(texts)]}


def carry(conversations: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package with these conversations in the place of chitchat-dataset."""
    monkeypatch.setitem(sys.modules, "chitchat_dataset", SimpleNamespace(Dataset=lambda: conversations))


def test_the_last_turn_is_the_answer_and_four_before_it_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    carry({str(i): talk("one", "two", "three", "four", "five", " six ") for i in range(60)}, monkeypatch)
    for record in read_chitchat("train"):
        assert record.context == "Continue the conversation.\ntwo\nthree\nfour"
        assert (record.prompt, record.answer) == ("five", "six")


def test_messages_of_one_turn_are_joined_and_empty_turns_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = talk("one", "two", "three", "four")
    whole["messages"][3].append({"sender": "b", "text": "and more"})
    whole["messages"].insert(2, [])
    carry({str(i): whole for i in range(40)}, monkeypatch)
    record = read_chitchat("train")[0]
    assert record.context == "Continue the conversation.\none\ntwo"
    assert (record.prompt, record.answer) == ("three", "four and more")


def test_every_conversation_is_in_one_part_whatever_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = {str(i): talk("one", "two", "three", str(i)) for i in range(400)}
    carry(conversations, monkeypatch)
    train, test = ({record.id for record in read_chitchat(part)} for part in ("train", "test"))
    assert train | test == conversations.keys()
    assert not train & test
    assert 0 < len(test) < 3 * len(conversations) / TEST_SHARE
    carry({key: conversations[key] for key in sorted(test)}, monkeypatch)
    assert {record.id for record in read_chitchat("test")} == test


@pytest.mark.parametrize(
    "unfit",
    [
        talk("one", "two", "three"),
        talk("one", "two", "three", "four", speakers="a"),
        talk("one", "two", "three", "four", speakers="abc"),
        talk("one", "two", "three", " "),
        talk("one", "two", " ", "four"),
    ],
)
def test_what_is_no_conversation_of_two_is_left_out(unfit: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    carry({str(i): unfit for i in range(60)}, monkeypatch)
    assert read_chitchat("train") == read_chitchat("test") == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
    with pytest.raises(
        DataError, match=r"chitchat: needs chitchat-dataset; in a clone of smoa, run: pip install '\.\[dialogue\]'"
    ):
        read_chitchat("train")
