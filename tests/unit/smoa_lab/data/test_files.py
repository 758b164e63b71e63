from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from smoa.errors import DataError
from smoa_lab.data.files import FileSource, HubRows, HubSource, _is_local, read_rows
from smoa_lab.data.formats import BadRow, Format, recognise, shape, unrecognised
from tests.support.damaged_bytes import Damaged, json_row, parquet_table
from tests.support.damaged_rows import damaged_files
from tests.support.own_rows import write_rows

ROWS = [{"text": "Café, or “tea”?", "id": "1"}, {"text": 'Two\nlines, "quoted"', "id": "2"}]
CSV = 'text,id\n"Café, or “tea”?",1\n"Two\nlines, ""quoted""",2\n'
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def written(file: Path) -> Path:
    """A file with ROWS, of the kind that its name says."""
    kinds = {"jsonl": LINES.encode(), "json": json.dumps(ROWS).encode(), "csv": CSV.encode()}
    kinds["parquet"] = parquet_table(ROWS)
    content = kinds[file.name.lower().removesuffix(".gz").rpartition(".")[2]]
    file.write_bytes(gzip.compress(content) if file.suffix.lower() == ".gz" else content)
    return file


KINDS = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "A.JSONL", "b.CSV.GZ"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows_and_says_where_they_are(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name)
    assert list(read_rows(file)) == [(f"{file}, row 1", ROWS[0]), (f"{file}, row 2", ROWS[1])]


def test_a_folder_is_read_by_name_whatever_the_kinds(tmp_path: Path) -> None:
    for name in ("c.csv", "a.jsonl", "b.parquet", ".hidden.jsonl"):
        written(tmp_path / name)
    (tmp_path / "README.md").write_text("About these files.")
    (tmp_path / "d.jsonl").mkdir()
    places = [where.removeprefix(f"{tmp_path}/") for where, _ in read_rows(tmp_path)]
    assert places == [f"{name}, row {n}" for name in ("a.jsonl", "b.parquet", "c.csv") for n in (1, 2)]


def test_a_place_is_named_as_the_user_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl")
    assert next(read_rows(Path("~/a.jsonl")))[0] == "~/a.jsonl, row 1"
    assert next(read_rows(Path("a.jsonl")))[0] == "a.jsonl, row 1"


def test_blank_lines_are_passed_over_and_counted_but_not_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\r\n\r\n{"text": "b"}\n\n')
    assert [where[-5:] for where, _ in read_rows(tmp_path / "a.jsonl")] == ["row 2", "row 4"]
    (tmp_path / "a.csv").write_bytes(b"\r\ntext,id\r\n\r\na,1\r\n\r\n")
    assert list(read_rows(tmp_path / "a.csv")) == [(f"{tmp_path}/a.csv, row 1", {"text": "a", "id": "1"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_mark_before_utf_8_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [row for _, row in read_rows(file)] == ROWS


def test_reading_goes_on_after_a_row_with_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": "c"}\n')
    (tmp_path / "a.csv").write_text("text,id\na,1\nb\nc,3\n")
    (tmp_path / "blank.json").write_text(" \n")
    with pytest.raises(DataError, match=r"blank\.json: has no rows"):
        list(read_rows(tmp_path / "blank.json"))
    for name in ("a.jsonl", "a.csv"):
        kinds = [isinstance(row, BadRow) for _, row in read_rows(tmp_path / name)]
        assert kinds == [False, True, False]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_the_first_row_is_given_before_a_later_fault_is_met(tmp_path: Path, name: str) -> None:
    rows = [{"text": "word " * 100}] * 5000
    lines = {"jsonl": b"".join(json_row(**row) for row in rows)}
    lines["csv"] = b"text\n" + b"".join(row["text"].encode() + b"\n" for row in rows)
    content = lines[name.removesuffix(".gz")[2:]] + b"\xe9"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = read_rows(tmp_path / name)
    assert next(found)[1] == rows[0]
    with pytest.raises(
        DataError, match=r"after row (4999|5000): byte 0xe9 at position \d+ is not UTF-8; save it as UTF-8"
    ):
        list(found)


@pytest.mark.parametrize("size", [1, 300_000])
def test_a_list_is_decoded_whole_wherever_its_pieces_end(tmp_path: Path, size: int) -> None:
    rows: list[dict[str, Any]] = [
        {"text": 'é\\"\n😀' * (size // 4), "n": -1.5e-7, "none": None, "right": True, "rest": [[], {}]}
        for _ in range(3)
    ]
    for ascii_only in (True, False):
        (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=1), encoding="utf-8")
        assert [row for _, row in read_rows(tmp_path / "a.json")] == rows


def test_a_list_too_large_to_read_whole_is_refused_with_the_format_that_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoa_lab.data.files.LARGEST_LIST", 10)
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    with pytest.raises(DataError, match=r"larger than 10 bytes.*\.jsonl"):
        list(read_rows(tmp_path / "a.json"))


def complaints(file: Path) -> Iterator[str]:
    """What is said of a file: the faults of its rows, and the error that ends it."""
    format: Format | None = None
    try:
        for where, row in read_rows(file):
            format = format or (None if isinstance(row, BadRow) else recognise(row))
            if (fault := row if isinstance(row, BadRow) else fault_of(row, format)) is not None:
                yield f"{where}: {fault}"
    except DataError as error:
        yield str(error)


def fault_of(row: dict[str, Any], format: Format | None) -> BadRow | None:
    try:
        return None if format and shape(row, format) else unrecognised(row)
    except BadRow as error:
        return error


@pytest.mark.parametrize("damaged", list(damaged_files()), ids=lambda damaged: damaged[0])
def test_a_damaged_file_is_named_with_the_place_the_field_and_what_is_expected(
    tmp_path: Path, damaged: Damaged
) -> None:
    name, content, expected = damaged
    (tmp_path / name).write_bytes(content)
    said = list(complaints(tmp_path / name))
    assert len(said) == 1, said
    assert said[0].startswith(str(tmp_path / name))
    assert expected in said[0]
    assert len(said[0]) < len(str(tmp_path)) + 600
    assert said[0].isprintable()


def test_a_place_without_data_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for place, told in (
        (Path("nowhere.jsonl"), r"nowhere\.jsonl: no such file; give the path of a file or folder that exists"),
        (tmp_path, "no file in this folder is one of jsonl, csv, parquet, json; name a file"),
        (Path("a" * 300 + ".jsonl"), "cannot be read: File name too long; check the path and its permissions"),
        (Path("~nobody-of-this-name/a.jsonl"), "cannot be read: Could not determine home directory"),
    ):
        with pytest.raises(DataError, match=told):
            read_rows(place)
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        FileSource(Path("nowhere.jsonl")).check()


@pytest.mark.parametrize("place", ["", "a.jsonl"])
def test_a_file_that_may_not_be_read_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    written(tmp_path / "a.jsonl")
    monkeypatch.setattr(Path, "open", refuse)  # a test may run as root, who may read everything
    with pytest.raises(DataError, match="cannot be read: Permission denied; check the path and its permissions"):
        read_rows(tmp_path / place)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        DataError,
        match=r"a\.parquet: cannot be read: Parquet: needs datasets; in a clone of smoa, run: pip install '\.\[lab\]'",
    ):
        list(read_rows(tmp_path / "a.parquet"))


def test_long_tables_are_read_in_batches(tmp_path: Path) -> None:
    rows = [{"text": str(number)} for number in range(100)]
    (tmp_path / "a.parquet").write_bytes(parquet_table(rows))
    found = list(islice(read_rows(tmp_path / "a.parquet"), 40, 42))
    assert found == [(f"{tmp_path}/a.parquet, row {n + 1}", rows[n]) for n in (40, 41)]


def read_json(tmp_path: Path, name: str, text: str) -> list[Any]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return [row for _, row in read_rows(tmp_path / name)]


def test_a_list_may_be_written_in_any_style_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    rows = [{"n": -12.5e3, "t": 'é"\\/\b😀', "l": [True, None, {"a": {}}]}, {}, {"t": "\u2028"}]
    for style in ({}, {"indent": 2}, {"ensure_ascii": False}):
        assert read_json(tmp_path, "a.json", f" \n{json.dumps(rows, **style)}\r\n\t") == rows  # type: ignore[arg-type]
    text = json.dumps(rows)
    for end in range(1, len(text), 7):
        with pytest.raises(DataError, match="is not JSON"):
            read_json(tmp_path, "a.json", text[:end])
    with pytest.raises(DataError, match="nested too deeply"):
        read_json(tmp_path, "a.json", "[" * 100_000)
    with pytest.raises(DataError, match=r"name the file \.jsonl"):
        read_json(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n')


def test_a_key_that_an_object_has_twice_is_bad_however_deep_and_only_in_its_row(tmp_path: Path) -> None:
    objects = ['{"a": [{"b": 1, "c": 2, "b": 1}]}', '{"a": {"b": 1}, "b": 2}', '{"\\ud83d": 1, "\\ud83d": 2}']
    for name, text in (("a.jsonl", "\n".join(objects)), ("a.json", f"[{','.join(objects)}]")):
        deep, good, odd = read_json(tmp_path, name, text)
        assert str(deep).startswith("b: ")
        assert "1 has this key twice in one object; keep one" in str(deep)
        assert good == {"a": {"b": 1}, "b": 2}
        assert odd.field == "\\ud83d"


def test_an_item_that_is_no_object_is_bad(tmp_path: Path) -> None:
    (row,) = read_json(tmp_path, "a.json", "[123456]")
    assert str(row) == "item 1 is not a JSON object but the number 123456; expected an object with columns"


HUB_ROWS = [{"text": "a"}, {"text": "b"}]
WANTED = HubRows(name="owner/rows", config="small", revision="v1", test_split="test")


def test_a_file_gives_its_rows_again_and_again(tmp_path: Path) -> None:
    source = FileSource(write_rows(tmp_path / "rows.jsonl", HUB_ROWS))
    source.check()
    expected = [(f"{tmp_path}/rows.jsonl, row {number}", row) for number, row in enumerate(HUB_ROWS, start=1)]
    assert list(source.rows()) == list(source.rows()) == expected
    assert source.name == str(tmp_path / "rows.jsonl")


def test_the_state_of_a_folder_changes_with_each_of_its_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", HUB_ROWS)
    source = FileSource(tmp_path)
    states = [source.state()]
    write_rows(tmp_path / "b.jsonl", HUB_ROWS)
    states.append(source.state())
    seen = (tmp_path / "a.jsonl").stat()
    write_rows(tmp_path / "a.jsonl", [{"text": "c"}, {"text": "d"}])
    os.utime(tmp_path / "a.jsonl", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    states.append(source.state())
    assert len({str(state) for state in states}) == 3
    os.utime(tmp_path / "a.jsonl", ns=(5, 5))
    assert source.state() == states[-1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the stub of the Hub was asked for."""
    calls: list[Any] = []

    def load(*names: Any, **options: Any) -> Iterator[dict[str, Any]]:
        calls.append((names, options))
        return iter(HUB_ROWS)

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            calls.append((name, revision))
            return SimpleNamespace(sha="abc")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_a_split_of_the_hub_is_read_as_a_stream(asked: list[Any]) -> None:
    source = HubSource(WANTED, "train")
    source.check()
    assert list(source.rows()) == [(f"owner/rows (train), row {n}", row) for n, row in enumerate(HUB_ROWS, start=1)]
    assert asked == [(("owner/rows", "small"), {"split": "train", "revision": "v1", "streaming": True})]
    state = source.state()
    assert state[1:] == ["train", "abc"]  # split and commit
    assert asked[1:] == [("owner/rows", "v1")]
    assert state != HubSource(WANTED, "test").state()


def broken_stream() -> Iterator[dict[str, Any]]:
    yield HUB_ROWS[0]
    raise ConnectionError("the connection broke")


@pytest.mark.parametrize(
    "failure",
    [ValueError("Unknown split"), datasets.exceptions.DatasetGenerationError("damaged"), None],
    ids=["split", "data", "connection"],
)
def test_what_the_hub_refuses_is_one_clear_error(failure: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        if failure is not None:
            raise failure
        return broken_stream()

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"data.hub: cannot read 'owner/rows', split 'train': "):
        list(HubSource(WANTED, "train").rows())


def test_a_data_set_that_cannot_be_found_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    for failure in (RepositoryNotFoundError("404", response=response), OfflineModeIsEnabled("offline")):

        class Api:
            def dataset_info(self, name: str, revision: str | None, failure: Exception = failure) -> Any:
                raise failure

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        with pytest.raises(DataError, match=r"data.hub.name: cannot find 'owner/rows' on the Hub: "):
            HubSource(WANTED, "train").state()


def test_places_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(map(_is_local, ("rows.jsonl", "a/rows.jsonl", "./a", "~/a", "/a/b", "folder", "a/b/c")))
    assert not any(map(_is_local, ("trl-lib/Capybara", "HuggingFaceH4/no_robots", "org/rows-v1.0")))
    (tmp_path / "trl-lib" / "Capybara").mkdir(parents=True)
    assert _is_local("trl-lib/Capybara")
