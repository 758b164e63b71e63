"""A user's own questions: JSON lines, CSV or Parquet with a map from our names to the file's columns."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict

from smoa.errors import DataError
from smoa_lab.data.records import Record, choice_record

Family = Literal["commonsense", "maths", "dialogue", "text"]


class Columns(BaseModel):
    """The file's column for each part of a record. ``choices`` is one column that holds a list (in CSV as JSON), or a
    list of columns; ``label`` holds the number of the right choice, from 0, or its text. With choices, ``label`` takes
    ``answer``'s place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = "prompt"
    answer: str | None = None
    context: str | None = None
    choices: str | list[str] | None = None
    label: str | None = None

    def names(self) -> list[str]:
        """Every column that the file must have."""
        choices = [self.choices] if isinstance(self.choices, str) else self.choices or []
        return [name for name in (self.prompt, self.answer, self.context, self.label, *choices) if name is not None]


class FileTask(BaseModel):
    """Where a task of one's own lies. Without ``test`` nothing is held out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str
    test: str | None = None
    family: Family = "text"
    columns: Columns = Columns()


def read_file_split(name: str, task: FileTask, split: str) -> list[Record]:
    """The records of one file, in order.

    Raises:
        DataError: names the file, the row and the column at fault: no such file, nothing in it, a column that is
            missing, a label outside the choices, an empty question.
    """
    path = task.train if split == "train" else task.test
    if path is None:
        return []
    file = Path(path).expanduser()
    rows = _rows(file)
    if not rows:
        raise DataError(f"{file}: holds no rows")
    return [_record(name, file, number, row, task.columns) for number, row in enumerate(rows, start=1)]


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    kind = file.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in READERS:
        raise DataError(f"{file}: cannot read files of this kind; give one of {', '.join(READERS)}")
    try:
        return READERS[kind](file)
    except (ValueError, OSError, EOFError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _json_lines(file: Path) -> list[dict[str, Any]]:
    with _open(file) as lines:
        return [_json_row(number, line) for number, line in enumerate(lines, start=1)]


def _json_row(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} holds no object: {line[:40]!r}")
    return row


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    with _open(file) as lines:
        return list(csv.DictReader(lines))


def _parquet_rows(file: Path) -> list[dict[str, Any]]:
    table = importlib.import_module("pyarrow.parquet").read_table(file)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _open(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", newline="")
    return file.open(encoding="utf-8", newline="")


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "jsonl": _json_lines,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
}


def _record(name: str, file: Path, number: int, row: dict[str, Any], columns: Columns) -> Record:
    where = f"{file}, row {number}"
    missing = [column for column in columns.names() if column not in row]
    if missing:
        raise DataError(
            f"{where}: has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}. "
            f"Map them under data.files.{name}.columns"
        )
    empty = [column for column in columns.names() if row[column] is None and column != columns.context]
    if empty:
        raise DataError(f"{where}: column {', '.join(map(repr, empty))} holds nothing")
    context = str(row[columns.context] or "") if columns.context else ""
    prompt = str(row[columns.prompt])
    if columns.choices is None:
        if columns.answer is None:
            raise DataError(f"data.files.{name}.columns: give answer, or choices and label")
        return Record(name, str(number), prompt, str(row[columns.answer]), context=context)
    try:
        choices = _choices(row, columns.choices)
        return choice_record(name, str(number), prompt, choices, _label(row, columns, choices), context)
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
        raise DataError(f"{columns!r} must hold a list of choices, in CSV as JSON, found {found!r}; or name columns")
    return list(map(str, found))


def _label(row: dict[str, Any], columns: Columns, choices: list[str]) -> int:
    column = columns.label or columns.answer
    if column is None:
        raise DataError("choices need a column with their label")
    value = row[column]
    if str(value) in choices:
        return choices.index(str(value))
    try:
        return int(value)
    except ValueError as error:
        raise DataError(f"label {value!r} is neither a choice's number nor one of {choices}") from error
