"""Reads a user's own questions from JSON lines, JSON, CSV or Parquet, by a map from our names to the file's columns."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from smoa.errors import DataError
from smoa_lab.basics.section import Section
from smoa_lab.data.records import Record, choice_record
from smoa_lab.rows.faults import Fault
from smoa_lab.rows.row_files import read_rows

Family = Literal["commonsense", "maths", "dialogue", "text"]


class Columns(Section):
    """The file's column for each part of a record. ``choices`` is one column with a list (in CSV as JSON), or a
    list of columns; ``label`` has the number of the right choice, from 0, or its text. With choices, ``label`` replaces
    ``answer``."""

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

    train: str
    test: str | None = None
    family: Family = "text"
    columns: Columns = Columns()

    @property
    def is_parquet(self) -> bool:
        """Whether a package is needed to read it."""
        return any(str(path).endswith(".parquet") for path in (self.train, self.test))


def read_file_split(name: str, task: FileTask, split: str) -> list[Record]:
    """The records of one file, in order.

    Raises:
        DataError: the file does not exist or is empty, a column is missing, a label is not one of the choices, or a
            question is empty; the message names file, row and column.
    """
    path = task.train if split == "train" else task.test
    if path is None:
        return []
    rows = [_sound(where, row) for where, row in read_rows(Path(path).expanduser())]
    return [_record(name, where, str(number), row, task.columns) for number, (where, row) in enumerate(rows, start=1)]


def _sound(where: str, row: dict[str, Any] | Fault) -> tuple[str, dict[str, Any]]:
    if isinstance(row, Fault):
        raise DataError(f"{where}: {row}")
    return where, row


def _record(name: str, where: str, number: str, row: dict[str, Any], columns: Columns) -> Record:
    missing = [column for column in columns.names() if column not in row]
    if missing:
        raise DataError(
            f"{where}: has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}. "
            f"Map them under data.files.{name}.columns"
        )
    empty = [column for column in columns.names() if row[column] is None and column != columns.context]
    if empty:
        raise DataError(f"{where}: column {', '.join(map(repr, empty))} is empty")
    context = str(row[columns.context] or "") if columns.context else ""
    prompt = str(row[columns.prompt])
    if columns.choices is None:
        if columns.answer is None:
            raise DataError(f"data.files.{name}.columns: give answer, or choices and label")
        return Record(name, number, prompt, str(row[columns.answer]), context=context)
    try:
        choices = _choices(row, columns.choices)
        return choice_record(name, number, prompt, choices, _label(row, columns, choices), context)
    except (DataError, ValueError) as error:
        raise DataError(f"{where}: {error}") from error


def _choices(row: dict[str, Any], columns: str | list[str]) -> list[str]:
    if not isinstance(columns, str):
        return [str(row[name]) for name in columns]
    found = row[columns]
    if isinstance(found, str):  # CSV has no lists
        with suppress(json.JSONDecodeError):
            found = json.loads(found)
    if not isinstance(found, list):
        raise DataError(
            f"{columns!r} must be a list of choices (in CSV as JSON), found {found!r}; or list one column per choice"
        )
    return list(map(str, found))


def _label(row: dict[str, Any], columns: Columns, choices: list[str]) -> int:
    column = columns.label or columns.answer
    if column is None:
        raise DataError("choices need a label column")
    value = row[column]
    if str(value) in choices:
        return choices.index(str(value))
    try:
        return int(value)
    except ValueError as error:
        raise DataError(f"label {value!r} is neither a choice's number nor one of {choices}") from error
