"""Named sets of questions from the Hub: CommonsenseQA, the eight commonsense sets of the adapter literature, GSM8K; and
the demo's questions of CommonsenseQA, which come with the package, under the MIT licence beside them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoa.errors import DataError
from smoa_lab.data.rows import Row, choice_question, question

Parts = tuple[str, list[str], int, str]
"""Prompt, choices, label (from 0) and context of a row."""
Parse = Callable[[dict[str, Any]], Parts | tuple[str, str]]
"""What a row of the Hub says; without choices, prompt and answer."""


def _winogrande(row: dict[str, Any]) -> Parts:
    return row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1, ""


def _boolq(row: dict[str, Any]) -> Parts:
    passage = f"{row['title']} -- {row['passage']}" if "title" in row else row["passage"]
    return f"{row['question']}?", ["yes", "no"], 0 if row["answer"] else 1, passage


def _piqa(row: dict[str, Any]) -> Parts:
    return row["goal"], [row["sol1"], row["sol2"]], int(row["label"]), ""


def _socialiqa(row: dict[str, Any]) -> Parts:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return f"{row['context']} {row['question']}", choices, int(row["label"]) - 1, ""


def _hellaswag(row: dict[str, Any]) -> Parts:
    def unmarked(text: str) -> str:
        """Without WikiHow's marks, as lm-eval removes them."""
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    beginning = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return unmarked(beginning), list(map(unmarked, row["endings"])), int(row["label"]), ""


def _lettered(row: dict[str, Any]) -> Parts:
    choices = row["choices"]
    question = row["question"] if "question" in row else row["question_stem"]
    return question, list(choices["text"]), list(choices["label"]).index(row["answerKey"]), ""


def _gsm8k(row: dict[str, Any]) -> tuple[str, str]:
    """Solutions end in ``#### number``."""
    return row["question"], row["answer"]


@dataclass(frozen=True)
class NamedSet:
    """A data set of the Hub. ``test`` is the split whose labels are public and on which the literature evaluates."""

    path: str
    parse: Parse
    test: str = "validation"
    config: str | None = None


# Copies of piqa and socialiqa, as lm-eval takes them: the originals are scripts, which datasets runs no more.
SETS: dict[str, NamedSet] = {
    "boolq": NamedSet("google/boolq", _boolq),
    "piqa": NamedSet("baber/piqa", _piqa),
    "socialiqa": NamedSet("lighteval/siqa", _socialiqa),
    "hellaswag": NamedSet("Rowan/hellaswag", _hellaswag),
    "winogrande": NamedSet("allenai/winogrande", _winogrande, config="winogrande_xl"),
    "arc_easy": NamedSet("allenai/ai2_arc", _lettered, "test", "ARC-Easy"),
    "arc_challenge": NamedSet("allenai/ai2_arc", _lettered, "test", "ARC-Challenge"),
    "openbookqa": NamedSet("allenai/openbookqa", _lettered, "test", "main"),
    "csqa": NamedSet("tau/commonsense_qa", _lettered),
    "gsm8k": NamedSet("openai/gsm8k", _gsm8k, "test", "main"),
}
DEMO = Path(__file__).with_name("csqa_demo.jsonl.gz")


def read_set(name: str, part: str) -> list[Row]:
    """The questions of the official training split, ``train``, or of the one that the literature tests on, ``test``.

    Raises:
        DataError: the Hub cannot be reached, or a row lacks a part.
    """
    import datasets

    wanted = SETS[name]
    try:
        rows = datasets.load_dataset(wanted.path, wanted.config, split=wanted.test if part == "test" else part)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{name}: {wanted.path} could not be downloaded from the Hub ({type(error).__name__}: {error}); offline, "
            "name your own copy under data.files"
        ) from error
    return [_question(name, number, row, wanted.parse) for number, row in enumerate(rows)]


def _question(name: str, number: int, row: dict[str, Any], parse: Parse) -> Row:
    try:
        found = parse(row)
    except (KeyError, ValueError) as error:
        raise DataError(f"{name}, the Hub's row {number}: {error!r}; the row has {sorted(row)}") from error
    identifier = str(row.get("id", number))
    if isinstance(found[1], str):
        prompt, answer = found
        return question(name, identifier, prompt, answer)
    prompt, choices, label, context = found
    texts = [text.strip() for text in choices]
    return choice_question(name, identifier, prompt.strip(), texts, label, context.strip())


def read_demo(part: str) -> list[Row]:
    """The demo's questions of one part, ``train``, ``validation`` or ``test``, in the order in which they are used."""
    with gzip.open(DEMO, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        choice_question("csqa-demo", row["id"], row["prompt"], row["choices"], row["label"])
        for row in rows
        if row["part"] == part
    ]
