import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from smoa.errors import DataError
from smoa_lab.data import general_text
from smoa_lab.data.formats import BadRow
from smoa_lab.data.general_text import passages
from smoa_lab.data.sources import FileSource, HubRows, HubSource, find_sources, read_rows
from tests.support.lab import write_rows


def parquet_table(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


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


@pytest.mark.parametrize(
    "name",
    [
        *("test.jsonl", "Validation.csv", "dev.jsonl.gz", "test-00000-of-00001.parquet", "my_val2.json", "v1.dev.csv"),
        *("test_sft-00000-of-00001.parquet", "my.test.jsonl", "heldout.jsonl"),
    ],
)
def test_a_folder_with_held_out_rows_beside_others_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path / name)
    assert len(list(read_rows(tmp_path))) == 2  # all of them are, as in data.test
    written(tmp_path / "train.jsonl")
    with pytest.raises(
        DataError, match=rf"{tmp_path}: {name} is not named like train.jsonl.* list .* data\.train .* data\.test"
    ):
        read_rows(tmp_path)


def test_names_that_only_hold_such_a_word_are_read(tmp_path: Path) -> None:
    for name in ("web_dev.jsonl", "stress-test.jsonl", "latest.csv", "interval.json", "rows.jsonl"):
        written(tmp_path / name)
    assert len(list(read_rows(tmp_path))) == 10


def test_a_place_is_named_as_the_user_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl")
    assert next(read_rows(Path("~/a.jsonl")))[0] == "~/a.jsonl, row 1"
    assert next(read_rows(Path("a.jsonl")))[0] == "a.jsonl, row 1"


def test_blank_lines_are_passed_over_and_counted_but_not_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\r\n\r\n{"text": "b"}\n\n')
    assert [where[-5:] for where, _ in read_rows(tmp_path / "a.jsonl")] == ["row 2", "row 4"]
    (tmp_path / "a.csv").write_bytes(b"text,id\r\n\r\na,1\r\n\r\n")
    assert list(read_rows(tmp_path / "a.csv")) == [(f"{tmp_path}/a.csv, row 1", {"text": "a", "id": "1"})]


@pytest.mark.parametrize("mark", [";", ",", "\t"])
def test_a_table_has_the_separator_of_its_first_line(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f'prompt{mark}completion\n"a{mark}b"{mark}"c, d; e"\n')
    assert [row for _, row in read_rows(file)] == [{"prompt": f"a{mark}b", "completion": "c, d; e"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_mark_before_utf_8_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [row for _, row in read_rows(file)] == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_the_first_row_is_given_before_a_later_fault_is_met(tmp_path: Path, name: str) -> None:
    content = b"text\n" + b"word " * 100_000 + b"\n\xe9"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = read_rows(tmp_path / name)
    assert next(rows)[1] == {"text": "word " * 100_000}
    with pytest.raises(DataError, match=r"after row 1: .* byte 0xe9 .* UTF-8"):
        list(rows)


LINE = '{"text": "Café"}\n'.encode()
WHOLE = parquet_table([{"text": "a" * 5000}])
PACKED = gzip.compress(LINE * 1000)
UNREADABLE = {
    "list.json": (b'{"text": "a"}\n{"text": "b"}', r"\.jsonl for one object in each line"),
    "cut.json": (b'[{"text": "a"}, {"te', "column 18"),
    "object.json": (b'{"text": "a"}', "expected a list"),
    "latin.json": ('[{"text": "Café"}]'.encode("latin-1"), "UTF-8"),
    "empty-list.json": (b"[]", "no rows"),
    "deep.json": (b"[" * 100_000 + b"]" * 100_000, "cannot be read"),
    "blank.jsonl": (b"\n\n  \n", "no rows"),
    "empty.csv": (b"", "no rows"),
    "quote.csv": (b'text\na\n"b\nc\n', "after row 1"),
    "utf-16.csv": ("text\nCafé\n".encode("utf-16"), "UTF-8"),
    "no-rows.parquet": (parquet_table([]), "no rows"),
    "words.parquet": (b"hello", "cannot be read"),
    "cut.parquet": (WHOLE[:-20], "whole"),
    "broken.parquet": (WHOLE[:100] + bytes(200) + WHOLE[300:], "whole"),
    "cut.jsonl.gz": (PACKED[:-20], "whole"),
    "bits.csv.gz": (PACKED[:20] + bytes(9) + PACKED[29:], "whole"),
    "table.xlsx": (b"PK", "jsonl, csv, parquet, json"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_one_error_with_the_rule(tmp_path: Path, name: str) -> None:
    content, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(read_rows(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))


BAD_ROWS = {
    "cut.jsonl": (b'{"text": "a', "Unterminated string"),
    "long.jsonl": (b'{"text": "' + b"word " * 100_000, "Unterminated string"),
    "two.jsonl": (b'{"text": "a"} {"text": "b"}', "Extra data"),
    "list.jsonl": (b'[{"text": "a"}]', "expected an object"),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", "digits"),
    "latin.jsonl": (LINE.decode().encode("latin-1"), "byte 0xe9"),
    "number.json": (b"3", "expected an object"),
    "deep.jsonl": (b"[" * 100_000 + b"]" * 100_000, "is not JSON"),
    "many.csv": (b"a,b", "header.*quotes"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_reading_goes_on_after_a_row_with_a_fault(tmp_path: Path, name: str) -> None:
    content, words = BAD_ROWS[name]
    good = {"jsonl": b'{"text": "a"}', "json": b'{"text": "a"}', "csv": b"a"}[name.rpartition(".")[2]]
    lines = [good, content, good]
    whole = {"jsonl": b"\n".join(lines), "json": b"[" + b",".join(lines) + b"]", "csv": b"\n".join([b"text", *lines])}
    (tmp_path / name).write_bytes(whole[name.rpartition(".")[2]])
    first, (place, bad), last = read_rows(tmp_path / name)
    assert first[1] == last[1] == {"text": "a"}
    assert place.endswith("row 2")
    assert re.search(words, str(bad))
    assert len(str(bad)) < 400
    assert str(bad).isprintable()


def test_a_row_is_counted_bad_where_a_csv_file_has_too_few_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\na,1\nb\nc,3\n")
    assert [isinstance(row, BadRow) for _, row in read_rows(tmp_path / "a.csv")] == [False, True, False]


def test_a_place_without_data_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for place, words in (
        (Path("nowhere.jsonl"), r"nowhere\.jsonl: no such file, folder or named set; give"),
        (Path("boolqs"), "no such file, folder or named set; did you mean 'boolq'"),
        (tmp_path, "no file in this folder is one of jsonl, csv, parquet, json"),
    ):
        with pytest.raises(DataError, match=words):
            FileSource(place, str(place)).state()


HUB_ROWS = [{"text": "a"}, {"text": "b"}]
WANTED = HubRows(name="owner/rows", config="small", revision="v1", test_split="test")


def test_the_state_of_a_folder_changes_with_each_of_its_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", HUB_ROWS)
    source = FileSource(tmp_path, "rows")
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
    assert list(source.rows()) == [(f"owner/rows (train), row {n}", row) for n, row in enumerate(HUB_ROWS, start=1)]
    assert asked == [(("owner/rows", "small"), {"split": "train", "revision": "v1", "streaming": True})]
    state = source.state()
    assert state[1:] == ["train", "abc"]  # split and commit
    assert asked[1:] == [("owner/rows", "v1")]
    assert state != HubSource(WANTED, "test").state()


def test_a_local_place_is_told_from_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("rows.jsonl", "a/rows.jsonl", "./a", "~/a", "/a/b", "folder", "a/b/c"):
        assert find_sources(place) == (FileSource(Path(place), place), None)
    for place in ("trl-lib/Capybara", "org/rows-v1.0"):
        assert find_sources(place) == (HubSource(HubRows(name=place), "train"), None)
    (tmp_path / "trl-lib" / "Capybara").mkdir(parents=True)
    assert isinstance(find_sources("trl-lib/Capybara")[0], FileSource)


# general text


def test_the_packaged_story_has_no_notes_of_its_editors() -> None:
    found = passages("packaged")
    assert found[0].startswith("IN THE YEAR 2889.\nLittle though they seem to think of it")
    assert not any(word in text for text in found for word in ("Gutenberg", "Redactor", "***"))
    assert sum(len(text.split()) for text in found) > 5000


def test_a_file_is_cut_into_passages_of_enough_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general_text, "WORDS", 5)
    file = tmp_path / "own.txt"
    file.write_text("One two\nthree.\n\nFour five.\n\nSix seven eight nine ten.\n\nA rest.")
    assert passages(str(file)) == ["One two three.\nFour five.", "Six seven eight nine ten."]


def test_text_that_cannot_be_read_or_is_too_short_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        passages(str(tmp_path / "none.txt"))
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(DataError, match=r"short\.txt: has no passage of 120 words"):
        passages(str(tmp_path / "short.txt"))
