"""The tasks: named sets, kept in the cache folder, and a user's own questions in files; and the questions that a run
takes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from smoa.atomic import check_place, write_whole
from smoa.errors import DataError, nearest
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.section import Section
from smoa_lab.data.files import read_rows
from smoa_lab.data.formats import BadRow
from smoa_lab.data.named import SETS, read_demo, read_set
from smoa_lab.data.rows import Row, Split, choice_question, content_hash, question, question_values, split

# Raised whenever the normalization of a source changes, so that no stale cache is read.
FORMAT = 4


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
    columns: Columns = Columns()


@dataclass(frozen=True)
class Task:
    """``read("train" | "test")`` gives the official questions; they are ``cached``, or read each time. If the task is
    ``divided``, ``read("validation")`` gives some too, and all are in the order in which they are used."""

    source: str
    read: Callable[[str], list[Row]]
    cached: bool = False
    divided: bool = False


TASKS: dict[str, Task] = {
    "csqa-demo": Task("CommonsenseQA, in the package", read_demo, divided=True),
    **{name: Task(f"hub: {found.path}", partial(read_set, name), cached=True) for name, found in SETS.items()},
}


def find_task(name: str, files: Mapping[str, FileTask] | None = None) -> Task:
    """The task of that name, a file of the user's own first; raises DataError that names the nearest one."""
    own = (files or {}).get(name)
    if own is not None:
        return Task(own.train, partial(read_file_split, name, own))
    if name in TASKS:
        return TASKS[name]
    raise DataError(f"data.tasks: there is no task {name!r}{nearest(name, [*TASKS, *(files or {})])}")


def _questions(name: str, part: str, task: Task) -> list[Row]:
    if not task.cached:
        return task.read(part)
    file = cache_folder() / "data" / f"{name}-{part}-{FORMAT}.jsonl"
    if not file.is_file():
        check_place(file)
        rows = [json.dumps(question_values(row), ensure_ascii=False) for row in task.read(part)]
        write_whole(file, "\n".join(rows) + "\n")
    with file.open(encoding="utf-8") as lines:
        return [question(**json.loads(line)) for line in lines]


@dataclass(frozen=True)
class Selection:
    """The questions of a run, and an account: per task its source, sizes and what was dropped, and the content hashes
    of the three parts as used."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    account: dict[str, Any]

    @property
    def content(self) -> str:
        """What changes when the questions that a run uses do."""
        return " ".join(part["sha256"] for part in self.account["used"].values())


def select(
    tasks: Mapping[str, Task], sizes: Mapping[str, int | None], validation_part: float = 0.05, seed: int = 0
) -> Selection:
    """Training and validation questions are a sample of all tasks together, test questions one of each task.
    ``sizes`` has how many of each part; None means all. Of a task that is divided they are the first ones.

    Raises:
        DataError: a source cannot be loaded, or a divided task is one of several.
    """
    divided = [name for name, task in tasks.items() if task.divided]
    if divided and len(tasks) > 1:
        raise DataError(f"data.tasks: {divided[0]} has its own parts and order, and stands alone; leave the others out")

    def sample(rows: list[Row], part: str) -> list[Row]:
        shuffled = list(rows)
        if not divided:
            random.Random(seed).shuffle(shuffled)
        return shuffled[: sizes.get(part)]

    read = {name: (_questions(name, "train", task), _questions(name, "test", task)) for name, task in tasks.items()}
    tested = {row.content for _, test in read.values() for row in test}
    splits = {
        name: Split(train, tasks[name].read("validation"), test)
        if divided
        else split(train, test, validation_part, tested)
        for name, (train, test) in read.items()
    }
    train = sample([row for split in splits.values() for row in split.train], "train")
    validation = sample([row for split in splits.values() for row in split.validation], "validation")
    test = [row for split in splits.values() for row in sample(split.test, "test")]
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
    return Selection(train, validation, test, account)


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
