"""Questions out of a user's own files: kinds of files, choices and labels, and what is refused by row and column."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from smoa.errors import DataError
from smoa_lab.data.rows import Row
from smoa_lab.data.tasks import Columns, FileTask, read_file_split

ROWS: list[dict[str, Any]] = [
    {"q": "What warms the Earth?", "a": "the Moon", "b": "the Sun", "gold": 1},
    {"q": "What falls?", "a": "rain", "b": "hope", "gold": 0},
]
LABELLED = Columns(prompt="q", choices=["a", "b"], label="gold")
LISTED = Columns(prompt="q", choices="options", label="gold")


def read(file: Path, rows: list[dict[str, Any]] | str, columns: Columns = LABELLED, part: str = "train") -> list[Row]:
    """The questions of a file of the kind that its name says."""
    lines = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
    if file.suffix == ".csv" and not isinstance(rows, str):
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([rows[0], *(row.values() for row in rows)])
    elif file.suffix == ".parquet" and not isinstance(rows, str):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
    return read_file_split("own", FileTask(train=str(file), columns=columns), part)


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz", "own.csv", "own.parquet"])
def test_every_kind_of_file_gives_the_same_questions(tmp_path: Path, name: str) -> None:
    first, second = read(tmp_path / name, ROWS)
    assert (first.completion, second.completion) == ("the Sun", "rain")
    assert first.choices == ("the Moon", "the Sun")


def test_free_answers_need_no_choices_a_context_may_be_absent_and_nothing_is_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": "Say hello.", "reply": "Hello.", "story": None}]
    columns = Columns(answer="reply", context="story")
    (row,) = read(tmp_path / "own.jsonl", rows, columns)
    assert (row.completion, row.context, row.choices) == ("Hello.", "", ())
    assert read(tmp_path / "own.jsonl", rows, columns, "test") == []


FIRST = json.dumps(ROWS[0])
REFUSED: list[tuple[str, str | list[dict[str, Any]], Columns, str]] = [
    ("a.jsonl", "", LABELLED, "no rows"),
    ("a.jsonl", FIRST + '\n{"q": ', LABELLED, "row 2: is not JSON"),
    ("a.jsonl", FIRST + "\n\n[1]", LABELLED, "row 3: .* an object"),
    ("a.jsonl", [{"q": "Which?", "a": "x", "gold": 0}], LABELLED, "row 1: .*'b'.*'q', 'a', 'gold'"),
    ("a.jsonl", [{"prompt": "a"}], Columns(), r"data\.files\.own\.columns: give answer"),
    ("a.jsonl", ROWS, Columns(prompt="q", choices=["a", "b"]), "choices and label"),
    *(("a.jsonl", [ROWS[0], {**ROWS[1], "gold": gold}], LABELLED, "row 2: label") for gold in (2, -1, "neither")),
    *(
        ("a.jsonl", [ROWS[0], {**ROWS[1], column: value}], LABELLED, f"row 2: column '{column}' is empty")
        for column, value in (("q", None), ("b", ""), ("gold", " "))
    ),
    ("a.csv", "prompt,reply\nSay hello.,Hello.\nSay nothing.,\n", Columns(answer="reply"), "row 2: column 'reply'"),
    ("a.csv", "q,options,gold\nWhich?,x|y,y\n", LISTED, r"row 1: column 'options'.*in CSV as JSON.*'x\|y'"),
    *(
        ("a.jsonl", [{"q": "Which?", "options": ["x", blank, "y"], "gold": 0}], LISTED, "row 1: column 'options'")
        for blank in (None, " ")
    ),
    ("a.xlsx", "x", LABELLED, "jsonl, csv, parquet"),
]


@pytest.mark.parametrize(("name", "rows", "columns", "words"), REFUSED)
def test_what_is_no_question_is_refused_by_row_and_column(
    tmp_path: Path, name: str, rows: str | list[dict[str, Any]], columns: Columns, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path / name, rows, columns)


FOUR = Columns(prompt="q", choices=["a", "b", "c", "d"], label="gold")


@pytest.mark.parametrize(("cells", "choices"), [("v,w,x,", ("v", "w", "x")), ("v,w, ,", ("v", "w"))])
def test_a_row_may_have_fewer_choices_than_the_file_has_columns(
    tmp_path: Path, cells: str, choices: tuple[str, ...]
) -> None:
    rows = read(tmp_path / "own.csv", f"q,a,b,c,d,gold\nWhich?,v,w,x,y,0\nWhich?,{cells},0\n", FOUR)
    assert [row.choices for row in rows] == [("v", "w", "x", "y"), choices]


@pytest.mark.parametrize(("cells", "column"), [("v,,x,", "b"), (",w,x,y", "a"), ("v,,,", "b")])
def test_a_blank_choice_before_a_filled_one_and_a_lone_choice_are_refused(
    tmp_path: Path, cells: str, column: str
) -> None:
    with pytest.raises(DataError, match=rf"own\.csv, row 1: column '{column}' is empty"):
        read(tmp_path / "own.csv", f"q,a,b,c,d,gold\nWhich?,{cells},0\n", FOUR)


@pytest.mark.parametrize(
    ("options", "gold", "label"),
    [
        (["2", "3", "1"], 1, 1),  # beside texts a JSON number is the choice's number alone
        (["2", "3", "1"], "0", 0),  # the text of none
        (["2", "3", "1"], "3", 1),  # the number of none
        (["0", "1"], "1", 1),  # both ways the same
        (["x", "y"], " 1", 1),
        (["x", "y"], 1.0, 1),  # as in a Parquet file in which another label is missing
        ([10, 20], 20, 1),
        ([0.5, 2.0], 2.0, 1),
        (["x", "y", "y"], "y", 1),
        (["2", "3", "1"], "1", "number of '3'"),
        ([2, 3, 1], 1, "number of 3"),
        *((["x", "y"], gold, "neither") for gold in ([1], {"x": 1}, True, 1.5, 7, float("inf"))),
    ],
)
def test_a_label_is_the_number_of_a_choice_or_its_text_and_refused_where_it_is_both_or_neither(
    tmp_path: Path, options: list[Any], gold: object, label: int | str
) -> None:
    rows = [{"q": "Which?", "options": options, "gold": gold}]
    if isinstance(label, int):
        assert read(tmp_path / "own.jsonl", rows, LISTED)[0].label == label
    else:
        with pytest.raises(DataError, match=f"row 1: label .*{label}"):
            read(tmp_path / "own.jsonl", rows, LISTED)


def test_choices_in_one_column_of_a_csv_file_are_json(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "own.csv", 'q,options,gold\nWhich?,"[""x"", ""y""]",y\n', LISTED)
    assert (row.choices, row.label) == (("x", "y"), 1)
