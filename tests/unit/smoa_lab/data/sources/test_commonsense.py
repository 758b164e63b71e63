from __future__ import annotations

import pytest

from smoa.errors import DataError
from smoa_lab.data.sources import commonsense


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
    assert (record.prompt, record.answer, record.context) == (question, answer, context)


def test_a_row_without_its_column_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commonsense, "read_requests", lambda path: iter([{"doc_id": 0, "doc": {"query": "Q"}}]))
    with pytest.raises(DataError, match=r"piqa, document 0: KeyError\('choices'\); the row has \['query'\]"):
        commonsense.read_split("piqa", "test")
