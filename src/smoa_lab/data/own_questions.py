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

    def names(self) -> list[str]:
        """Every column that the file must have."""
        choices = [self.choices] if isinstance(self.choices, str) else self.choices or []
        return [name for name in (self.prompt, self.answer, self.context, self.label, *choices) if name is not None]


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
    rows = [_sound(where, row) for where, row in read_rows(Path(path).expanduser())]
    return [_question(name, where, str(number), row, task.columns) for number, (where, row) in enumerate(rows, start=1)]


def _sound(where: str, row: dict[str, Any] | BadRow) -> tuple[str, dict[str, Any]]:
    if isinstance(row, BadRow):
        raise DataError(f"{where}: {row}")
    return where, row


def _question(name: str, where: str, number: str, row: dict[str, Any], columns: Columns) -> Row:
    missing = [column for column in columns.names() if column not in row]
    if missing:
        raise DataError(
            f"{where}: has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}. "
            f"Map them under data.files.{name}.columns"
        )
    columns = _without_blank_end(columns, row)
    empty = [column for column in columns.names() if _is_blank(row[column]) and column != columns.context]
    if empty:
        raise DataError(f"{where}: column {', '.join(map(repr, empty))} is empty")
    context = str(row[columns.context] or "") if columns.context else ""
    prompt = str(row[columns.prompt])
    if columns.choices is None:
        if columns.answer is None:
            raise DataError(f"data.files.{name}.columns: give answer, or choices and label")
        return question(name, number, prompt, str(row[columns.answer]), context=context)
    try:
        choices = _choices(row, columns.choices)
        label = _label(row, columns, choices)
    except (DataError, ValueError) as error:
        raise DataError(f"{where}: {error}") from error
    return choice_question(name, number, prompt, list(map(str, choices)), label, context)


def _is_blank(value: object) -> bool:
    return value is None or not str(value).strip()


def _without_blank_end(columns: Columns, row: dict[str, Any]) -> Columns:
    """Without the last columns of choices that the row leaves blank; two stay, since one choice is no question."""
    if not isinstance(columns.choices, list):
        return columns
    used = len(columns.choices)
    while used > 2 and _is_blank(row[columns.choices[used - 1]]):
        used -= 1
    return columns.model_copy(update={"choices": columns.choices[:used]})


def _choices(row: dict[str, Any], columns: str | list[str]) -> list[Any]:
    if not isinstance(columns, str):
        return [row[name] for name in columns]
    found = row[columns]
    if isinstance(found, str):  # CSV has no lists
        with suppress(json.JSONDecodeError):
            found = json.loads(found)
    if not isinstance(found, list):
        raise DataError(
            f"{columns!r} must be a list of choices (in CSV as JSON), found {found!r}; or list one column per choice"
        )
    blank = [number for number, choice in enumerate(found) if _is_blank(choice)]
    if blank:
        raise DataError(f"column {columns!r}: choice {blank[0]}, from 0, is empty; fill it or leave it out")
    return found


def _label(row: dict[str, Any], columns: Columns, choices: list[Any]) -> int:
    column = columns.label or columns.answer
    if column is None:
        raise DataError("choices need a label column")
    value = row[column]
    number = str(value).strip().removesuffix(".0")
    by_number = [i for i in range(len(choices)) if str(i) == number]
    by_text = [
        i
        for i, choice in enumerate(choices)
        if str(choice) == str(value) and not (type(value) is int and isinstance(choice, str))  # 1 is not "1"
    ]
    found = {*by_number, *by_text[:1]}
    if not found:
        raise DataError(f"label {value!r} is neither a choice's number, from 0, nor one of {choices}")
    if len(found) > 1:
        raise DataError(
            f"label {value!r} is the number of {choices[by_number[0]]!r}, from 0, and the text of another choice; in a "
            "JSON lines file write the right choice's number without quotes and all choices with quotes"
        )
    return found.pop()
