"""The study of biographies: one value of each fact for each person, asked in a phrasing that is never trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import biographies
import phonebook
import pytest

from smoa_lab.study.trials import Trial
from tests.support import studies


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


def test_the_report_says_what_is_known_and_what_was_forgotten(tmp_path: Path) -> None:
    study = studies.tiny_study(tmp_path / "biographies-2")
    studies.finish_untouched(study, scores={}, elsewhere=3.5)
    training = {"learning_rate": 0.01, "per_device_train_batch_size": 8}
    for seed, accuracy in enumerate((0.25, 0.75)):
        scores = {"all": {"questions": 12, "gold_loss": 1.0, "accuracy": accuracy}}
        config, trial = {"training": training}, Trial("final", "ours", 0.01, seed)
        studies.finish(study, trial, 1.0, config=config, steps=80, scores=scores, as_trained=1.0, elsewhere=3.75)
    (tmp_path / "biographies").mkdir()
    biographies.report(tmp_path)
    text = (tmp_path / "biographies/README.md").read_text()
    assert "| 2 | ours | 0.01 | 2 | 100.0 ± 0.0 | 50.0 ± 35.4 | +0.250 | 40 |" in text
