"""Reads a user's own questions from JSON lines, JSON, CSV or Parquet, by a map from our names to the file's columns."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from smoa.errors import DataError
from smoa_lab.basics.section import Section
from smoa_lab.data.files import read_rows
from smoa_lab.data.formats import BadRow
from smoa_lab.data.rows import Row, choice_question, question

Family = Literal["commonsense", "maths", "dialogue", "text"]


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

    @property
    def is_parquet(self) -> bool:
        """Whether a package is needed to read it."""
        return any(str(path).endswith(".parquet") for path in (self.train, self.test))


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
    own = (columns.prompt, columns.answer, columns.context, columns.label)
    single = [column for column in (*own, columns.choices) if isinstance(column, str)]
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
    if columns.choices is None:
        if columns.answer is None:
            raise DataError(f"data.files.{name}.columns: give answer, or choices and label")
        return question(name, number, prompt, str(row[columns.answer]), context=context)
    label = columns.label or columns.answer
    if label is None:
        raise DataError("choices need a label column")
    choices = [row[column] for column in listed] or _list_of_choices(row[str(columns.choices)], str(columns.choices))
    return choice_question(name, number, prompt, list(map(str, choices)), _label(row[label], choices), context)


def _is_blank(value: object) -> bool:
    return value is None or not str(value).strip()


def _list_of_choices(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):  # CSV has no lists
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise DataError(
            f"{column!r} must be a list of choices (in CSV as JSON), found {value!r}; or list one column per choice"
        )
    blank = [number for number, choice in enumerate(value) if _is_blank(choice)]
    if blank:
        raise DataError(f"column {column!r}: choice {blank[0]}, from 0, is empty; fill it or leave it out")
    return value


def _label(value: Any, choices: list[Any]) -> int:
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
