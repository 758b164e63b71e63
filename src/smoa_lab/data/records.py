"""The record of a question, and operations on lists of records: deduplicate, split, hash."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smoa.errors import DataError


@dataclass(frozen=True)
class Record:
    """A question with its gold answer.

    ``choices`` is empty where the answer is free text; otherwise ``choices[label] == answer``. ``context`` is a passage
    that the question is about, or the turns before it.
    ``id`` is the source's own identifier and no part of the content: two records are duplicates when all else agrees.
    """

    task: str
    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    context: str = ""

    def __post_init__(self) -> None:
        where = f"{self.task}, record {self.id}"
        if not self.prompt.strip() or not self.answer.strip():
            raise DataError(f"{where}: prompt and answer must not be empty; got {self.prompt!r} and {self.answer!r}")
        if not self.choices:
            return
        if self.label is None or self.choices[self.label] != self.answer:
            raise DataError(f"{where}: answer {self.answer!r} is not choice number {self.label} of {self.choices}")

    @property
    def content(self) -> tuple[str, ...]:
        """What makes two records the same question: context, prompt, answer and choices (in any order), whatever the
        white space and the case."""
        texts = (self.context, self.prompt, self.answer, *sorted(self.choices))
        return tuple(" ".join(text.split()).casefold() for text in texts)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Record:
        """The inverse of :func:`dataclasses.asdict`, also after a trip through JSON."""
        return cls(**{**row, "choices": tuple(row["choices"])})


@dataclass(frozen=True)
class Split:
    """The three parts of a task, and how many training records were dropped: ``also_in_test`` because the test part
    has them, ``repeated`` because the training part already had them."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    also_in_test: int = 0
    repeated: int = 0


def choice_record(
    task: str, identifier: str, prompt: str, choices: Sequence[str], label: int, context: str = ""
) -> Record:
    """A multiple-choice record; raises DataError if ``label`` (from 0) is outside ``choices``."""
    if not 0 <= label < len(choices):
        raise DataError(
            f"{task}, record {identifier}: label {label} is outside its {len(choices)} choices (counted from 0)"
        )
    return Record(task, identifier, prompt, choices[label], tuple(choices), label, context)


Parts = tuple[str, list[str], int, str]
"""Prompt, choices, label (from 0) and context of a row."""


def row_record(
    task: str, number: int, row: dict[str, Any], parse: Callable[[dict[str, Any]], Parts], place: str
) -> Record:
    """The multiple-choice record of a data set's row; raises DataError, which names ``place``, if it lacks a part."""
    try:
        prompt, choices, label, context = parse(row)
    except (KeyError, ValueError) as error:
        raise DataError(f"{task}, {place}: {error!r}; the row has {sorted(row)}") from error
    texts = [text.strip() for text in choices]
    return choice_record(task, str(row.get("id", number)), prompt.strip(), texts, label, context.strip())


def in_test_part(text: str, one_in: int) -> bool:
    """Whether a record without an official split belongs to the test part: one of ``one_in``, by a hash of ``text``."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % one_in == 0


def split(train: Sequence[Record], test: Sequence[Record], validation_part: float) -> Split:
    """Drop from ``train`` the records of ``test`` and repeated ones, then cut off a validation part.

    The cut is the same in all runs, whatever their seed and however much data they use.
    """
    unseen = without_overlap(train, test)
    order = without_duplicates(unseen)
    dropped = {"also_in_test": len(train) - len(unseen), "repeated": len(unseen) - len(order)}
    random.Random(0).shuffle(order)
    held_out = int(len(order) * validation_part)
    return Split(order[held_out:], order[:held_out], list(test), **dropped)


def without_overlap(records: Iterable[Record], test: Iterable[Record]) -> list[Record]:
    """The records whose content is not in ``test``, in order."""
    held_out = {record.content for record in test}
    return [record for record in records if record.content not in held_out]


def without_duplicates(records: Iterable[Record]) -> list[Record]:
    """The first record of each content, in order."""
    return list({record.content: record for record in reversed(list(records))}.values())[::-1]


def content_hash(records: Iterable[Record]) -> str:
    """SHA-256 over the rows in order, identifiers aside: equal for equal data, whatever the source."""
    digest = hashlib.sha256()
    for record in records:
        row = asdict(record)
        del row["id"]
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
