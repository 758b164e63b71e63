from __future__ import annotations

import pytest

from smoa_lab.data.records import Record, choice_record
from smoa_lab.data.sources import prose

LONG = "word " * prose.MIN_WORDS


def question(number: int, context: str) -> Record:
    return choice_record("boolq", str(number), "is it so?", ["no", "yes"], 1, context)


def test_each_long_passage_is_read_once_with_its_title(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [f"Rain -- {LONG}", f"Rain -- {LONG}", "Snow -- too short", f"Jack-in-the-box -- Wood -- {LONG}"]
    questions = [question(*pair) for pair in enumerate(contexts)]
    monkeypatch.setattr(prose, "read_split", lambda name, split: questions)
    found = prose.read_prose("train")
    assert [(record.prompt, record.answer) for record in found] == [
        ("Rain", LONG.strip()),
        ("Jack-in-the-box", f"Wood -- {LONG.strip()}"),
    ]


def test_the_test_part_has_the_first_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [question(number, f"Title {number} -- {LONG}") for number in range(prose.TEST_PASSAGES + 5)]
    monkeypatch.setattr(prose, "read_split", lambda name, split: questions)
    assert [record.id for record in prose.read_prose("test")] == [str(i) for i in range(prose.TEST_PASSAGES)]
    assert len(prose.read_prose("train")) == prose.TEST_PASSAGES + 5
