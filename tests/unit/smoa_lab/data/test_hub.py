"""The hub's rows, as its data set cards show them, give the packaged source's records."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from smoa.errors import DataError
from smoa_lab.data import commonsense
from smoa_lab.data.rows import content_hash

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "boolq": (
        {"question": "does ethanol take more energy make that produces", "title": "Ethanol fuel", "answer": False,
         "passage": "All biomass goes through at least some of these steps."},
        {"query": "Ethanol fuel -- All biomass goes through at least some of these steps.\n"
                  "Question: does ethanol take more energy make that produces?\nAnswer:",
         "choices": ["yes", "no"], "gold": 1},
    ),
    "piqa": (
        {"goal": "When boiling butter, when it's ready, you can", "sol1": "Pour it onto a plate",
         "sol2": "Pour it into a jar", "label": 1},
        {"query": "Goal: When boiling butter, when it's ready, you can\nAnswer:",
         "choices": ["Pour it onto a plate", "Pour it into a jar"], "gold": 1},
    ),
    "socialiqa": (
        {"context": "Tracy didn't go home that evening and resisted Riley's attacks.",
         "question": "What does Tracy need to do before this?", "answerA": "make a new plan",
         "answerB": "Go home and see Riley", "answerC": "Find somewhere to go", "label": "3"},
        {"query": "Question: Tracy didn't go home that evening and resisted Riley's attacks. "
                  "What does Tracy need to do before this?\nAnswer:",
         "choices": ["make a new plan", "Go home and see Riley", "Find somewhere to go"], "gold": 2},
    ),
    "arc_easy": (
        {"id": "MCAS_2000_4_6", "question": "Which technology was developed most recently?", "answerKey": "A",
         "choices": {"text": ["cellular telephone", "television", "refrigerator", "airplane"],
                     "label": ["A", "B", "C", "D"]}},
        {"id": "MCAS_2000_4_6", "query": "Question: Which technology was developed most recently?\nAnswer:",
         "choices": ["cellular telephone", "television", "refrigerator", "airplane"], "gold": 0},
    ),
    "hellaswag": (
        {"activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
         "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                     "is holding a rubik's cube.", "starts pulling up roofing on a roof."], "label": "3"},
        {"query": "Roof shingle removal: A man is sitting on a roof. He",
         "choices": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                     "is holding a rubik's cube.", "starts pulling up roofing on a roof."], "gold": 3},
    ),
    "winogrande": (
        {"sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
         "option1": "Sarah", "option2": "Maria", "answer": "2"},
        {"sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
         "option1": "Sarah", "option2": "Maria", "answer": "2"},
    ),
    "openbookqa": (
        {"id": "8-376", "question_stem": "Frilled sharks live deep, which is why they are known as", "answerKey": "A",
         "choices": {"text": ["Deep sea animals", "fish"], "label": ["A", "B"]}},
        {"id": "8-376", "query": "Question: Frilled sharks live deep, which is why they are known as\nAnswer:",
         "choices": ["Deep sea animals", "fish"], "gold": 0},
    ),
    "csqa": (
        {"id": "1afa02", "question": "Where is a revolving door a security measure?", "question_concept": "door",
         "answerKey": "A", "choices": {"text": ["bank", "library"], "label": ["A", "B"]}},
        {"id": "1afa02", "query": "Question: Where is a revolving door a security measure?\nAnswer:",
         "choices": ["bank", "library"], "gold": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", PAIRS)
def test_both_sources_give_identical_records(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_row, packaged_row = PAIRS[task]
    monkeypatch.setattr(commonsense, "read_requests", lambda path: iter([{"doc_id": 0, "doc": packaged_row}]))
    packaged = commonsense.read_split(task, "test")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [hub_row])
    assert content_hash(commonsense.read_hub_split(task, "test")) == content_hash(packaged)


def test_a_hub_row_without_its_column_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "x"}])
    with pytest.raises(DataError, match=r"piqa, the Hub's row 0: KeyError\('goal'\)"):
        commonsense.read_hub_split("piqa", "train")


def test_a_split_of_the_hub_is_asked_for_by_the_name_that_it_has_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return [PAIRS["winogrande"][0]]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for part in ("train", "test"):
        (record,) = commonsense.read_hub_split("winogrande", part)
        assert record.completion == "Maria"
    assert asked == [("allenai/winogrande", "winogrande_xl", part) for part in ("train", "validation")]


def test_a_hub_that_cannot_be_reached_is_told_with_the_other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, config: str | None, split: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"ybisk/piqa: could not be downloaded from the Hub \(ConnectionError.*source: packaged"
    ):
        commonsense.read_hub_split("piqa", "train")
