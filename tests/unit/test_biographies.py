"""The study of biographies: one value of each fact for each person, asked in a phrasing that is never trained."""

from __future__ import annotations

import io
import json
from typing import Any

import biographies
import phonebook
import pytest


class Known:
    """Stands for the package of names and values."""

    def open(self, name: str) -> Any:
        values = [f"Thing {number}" for number in range(70)]
        lists: Any = {key: values for _, key in biographies.FACTS} | {
            "company": {"name": [*values, "Far too long a one"]}
        }
        people = {"names": {"any": ["Ann", "Bob", "Cy"]}, "surnames": ["Fox", "Gray"]}
        return io.BytesIO(json.dumps(lists | people).encode())


class Words:
    """A tokenizer, as far as it is asked."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def test_each_fact_has_one_value_and_is_asked_in_a_phrasing_never_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (biographies, phonebook):
        monkeypatch.setattr(module, "MIMESIS", Known())
    words: Any = Words()
    rows = biographies.biographies(4, words)
    assert rows == biographies.biographies(4, words)
    facts = len(biographies.FACTS)
    assert {part: len(own) for part, own in rows.items()} == {"train": 192, "validation": 24, "test": 24}
    known: dict[str, set[Any]] = {}
    for own in rows.values():
        for row in own:
            known.setdefault(row.id.rpartition(" ")[0], set()).add(row.completion)
    assert len(known) == 4 * facts
    assert {len(values) for values in known.values()} == {1}
    prompts = [str(row.prompt) for own in rows.values() for row in own]
    assert len(set(prompts)) == len(prompts)
    assert all(len(words.tokenize(row.completion)) <= biographies.MOST_TOKENS for row in rows["train"])
