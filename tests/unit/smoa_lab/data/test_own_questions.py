from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.data.own_questions import Columns, FileTask, read_file_split

ROWS: list[dict[str, Any]] = [
    {"q": "What warms the Earth?", "a": "the Moon", "b": "the Sun", "gold": 1},
    {"q": "What falls?", "a": "rain", "b": "hope", "gold": 0},
]
COLUMNS = Columns(prompt="q", choices=["a", "b"], label="gold")


def write(file: Path, rows: list[dict[str, Any]]) -> FileTask:
    lines = "\n".join(json.dumps(row) for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix == ".csv":
        file.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
    elif file.suffix == ".parquet":
        pyarrow = importlib.import_module("pyarrow")
        importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text(lines)
    return FileTask(train=str(file), columns=COLUMNS)


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz", "own.csv", "own.parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    records = read_file_split("own", write(tmp_path / name, ROWS), "train")
    assert [record.completion for record in records] == ["the Sun", "rain"]
    assert records[0].choices == ("the Moon", "the Sun")


def test_choices_may_be_one_column_and_the_label_the_choices_text(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    write(file, [{"q": "Which?", "options": ["x", "y"], "gold": "y"}])
    task = FileTask(train=str(file), columns=Columns(prompt="q", choices="options", label="gold"))
    assert read_file_split("own", task, "train")[0].label == 1


def test_free_answers_need_no_choices(tmp_path: Path) -> None:
    write(tmp_path / "own.jsonl", [{"prompt": "Say hello.", "reply": "Hello."}])
    task = FileTask(train=str(tmp_path / "own.jsonl"), columns=Columns(answer="reply"))
    assert read_file_split("own", task, "train")[0].completion == "Hello."


def test_without_a_test_file_nothing_is_held_out(tmp_path: Path) -> None:
    assert read_file_split("own", write(tmp_path / "own.jsonl", ROWS), "test") == []


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    task = write(tmp_path / "own.jsonl", [{"q": "Which?", "a": "x", "gold": 0}])
    with pytest.raises(DataError, match=r"own\.jsonl, row 1: has no column 'b'; it has 'q', 'a', 'gold'"):
        read_file_split("own", task, "train")


@pytest.mark.parametrize("gold", [2, -1, "neither"])
def test_a_label_outside_the_choices_is_named_by_row(tmp_path: Path, gold: object) -> None:
    task = write(tmp_path / "own.jsonl", [ROWS[0], {**ROWS[1], "gold": gold}])
    with pytest.raises(DataError, match=r"own\.jsonl, row 2: .*label"):
        read_file_split("own", task, "train")


def test_a_file_that_cannot_be_read_and_columns_that_do_not_suffice_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    answers, labelled = Columns(answer="answer"), Columns(prompt="q", choices=["a", "b"])
    for text, columns, told in (
        ("", answers, "has no rows"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": ', answers, "row 2: is not JSON"),
        ('{"prompt": "a", "answer": "b"}\n\n[1]', answers, r"own\.jsonl, row 3: .*expected an object"),
        ('{"prompt": "a"}', Columns(), r"data\.files\.own\.columns: give answer, or choices and label"),
        (json.dumps(ROWS[0]), labelled, r"own\.jsonl, row 1: choices need a label column"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=told):
            read_file_split("own", FileTask(train=str(file), columns=columns), "train")
    (tmp_path / "own.xlsx").write_text("x")
    for name, told in (("nowhere.jsonl", "no such file"), ("own.xlsx", "use one of jsonl, csv, parquet")):
        with pytest.raises(DataError, match=told):
            read_file_split("own", FileTask(train=str(tmp_path / name)), "train")


@pytest.mark.parametrize(("column", "value"), [("q", None), ("b", ""), ("gold", " ")])
def test_a_cell_that_holds_nothing_is_named(tmp_path: Path, column: str, value: str | None) -> None:
    task = write(tmp_path / "own.jsonl", [ROWS[0], ROWS[1] | {column: value}])
    with pytest.raises(DataError, match=rf"own\.jsonl, row 2: column '{column}' is empty"):
        read_file_split("own", task, "train")


def test_a_free_answer_that_is_blank_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("prompt,reply\nSay hello.,Hello.\nSay nothing.,\n")
    task = FileTask(train=str(tmp_path / "own.csv"), columns=Columns(answer="reply"))
    with pytest.raises(DataError, match=r"own\.csv, row 2: column 'reply' is empty"):
        read_file_split("own", task, "train")


def choices_of_cells(file: Path, cells: str) -> list[tuple[str, ...]]:
    """The choices of a CSV file with up to four of them in a row."""
    file.write_text(f"q,a,b,c,d,gold\nWhich?,v,w,x,y,0\nWhich?,{cells},0\n")
    columns = Columns(prompt="q", choices=["a", "b", "c", "d"], label="gold")
    return [record.choices for record in read_file_split("own", FileTask(train=str(file), columns=columns), "train")]


def test_a_row_may_have_fewer_choices_than_the_file_has_columns(tmp_path: Path) -> None:
    assert choices_of_cells(tmp_path / "own.csv", "v,w,x,") == [("v", "w", "x", "y"), ("v", "w", "x")]
    assert choices_of_cells(tmp_path / "own.csv", "v,w, ,")[1] == ("v", "w")


@pytest.mark.parametrize(("cells", "column"), [("v,,x,", "b"), (",w,x,y", "a"), ("v,,,", "b")])
def test_a_blank_choice_before_a_filled_one_and_a_lone_choice_are_refused(
    tmp_path: Path, cells: str, column: str
) -> None:
    with pytest.raises(DataError, match=rf"own\.csv, row 2: column '{column}' is empty"):
        choices_of_cells(tmp_path / "own.csv", cells)


def label_in_list(file: Path, options: list[Any], gold: object) -> int | None:
    write(file, [{"q": "Which?", "options": options, "gold": gold}])
    task = FileTask(train=str(file), columns=Columns(prompt="q", choices="options", label="gold"))
    return read_file_split("own", task, "train")[0].label


@pytest.mark.parametrize("blank", [None, "", " "])
def test_a_blank_choice_in_a_list_is_refused(tmp_path: Path, blank: str | None) -> None:
    with pytest.raises(DataError, match=r"own\.jsonl, row 1: column 'options': choice 1, from 0, is empty"):
        label_in_list(tmp_path / "own.jsonl", ["x", blank, "y"], 0)


@pytest.mark.parametrize(
    ("options", "gold", "label"),
    [
        (["2", "3", "1"], 1, 1),  # beside texts a JSON number is the choice's number alone
        (["2", "3", "1"], "0", 0),  # the text of none
        (["2", "3", "1"], "3", 1),  # the number of none
        (["0", "1"], "1", 1),  # both ways the same
        (["x", "y"], "1", 1),  # as in a CSV file
        (["x", "y"], " 1", 1),
        (["x", "y"], 1.0, 1),  # as in a Parquet file in which another label is missing
        ([10, 20], 20, 1),
        ([0.5, 2.0], 2.0, 1),
        (["x", "y", "y"], "y", 1),
    ],
)
def test_a_label_is_the_number_of_a_choice_or_its_text(
    tmp_path: Path, options: list[Any], gold: object, label: int
) -> None:
    assert label_in_list(tmp_path / "own.jsonl", options, gold) == label


@pytest.mark.parametrize(("options", "gold"), [(["2", "3", "1"], "1"), ([2, 3, 1], 1)])
def test_a_label_that_is_one_choices_number_and_anothers_text_is_refused(
    tmp_path: Path, options: list[Any], gold: object
) -> None:
    with pytest.raises(DataError, match=r"row 1: label '?1'? is the number of '?3'?, from 0, and the text of another"):
        label_in_list(tmp_path / "own.jsonl", options, gold)


@pytest.mark.parametrize("gold", [[1], {"x": 1}, True, 1.5, 7, float("inf")])
def test_a_label_that_is_neither_number_nor_text_of_a_choice_is_refused(tmp_path: Path, gold: object) -> None:
    with pytest.raises(
        DataError, match=r"own\.jsonl, row 1: label .* is neither a choice's number, from 0, nor one of"
    ):
        label_in_list(tmp_path / "own.jsonl", ["x", "y"], gold)


def test_a_context_may_be_absent(tmp_path: Path) -> None:
    write(tmp_path / "own.jsonl", [row | {"story": None} for row in ROWS])
    task = FileTask(train=str(tmp_path / "own.jsonl"), columns=COLUMNS.model_copy(update={"context": "story"}))
    assert [record.context for record in read_file_split("own", task, "train")] == ["", ""]


def test_choices_in_one_column_of_a_csv_file_are_json(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text('q,options,gold\nWhich?,"[""x"", ""y""]",y\n')
    columns = Columns(prompt="q", choices="options", label="gold")
    task = FileTask(train=str(tmp_path / "own.csv"), columns=columns)
    assert read_file_split("own", task, "train")[0].choices == ("x", "y")
    (tmp_path / "own.csv").write_text("q,options,gold\nWhich?,x|y,y\n")
    with pytest.raises(DataError, match=r"row 1: 'options' must be a list of choices \(in CSV as JSON\), found 'x\|y'"):
        read_file_split("own", task, "train")
