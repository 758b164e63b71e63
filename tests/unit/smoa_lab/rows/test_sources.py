"""Files and data sets of the Hub as sources; the Hub is a stub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from smoa.errors import DataError
from smoa_lab.rows.sources import FileSource, HubRows, HubSource, _is_local
from tests.support.own_rows import write_rows

ROWS = [{"text": "a"}, {"text": "b"}]
WANTED = HubRows(name="owner/rows", config="small", revision="v1", test_split="test")


def test_a_file_gives_its_rows_again_and_again(tmp_path: Path) -> None:
    source = FileSource(write_rows(tmp_path / "rows.jsonl", ROWS))
    source.check()
    expected = [(f"{tmp_path}/rows.jsonl, row {number}", row) for number, row in enumerate(ROWS, start=1)]
    assert list(source.rows()) == list(source.rows()) == expected
    assert source.name == str(tmp_path / "rows.jsonl")


def test_the_state_of_a_folder_changes_with_each_of_its_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    source = FileSource(tmp_path)
    states = [source.state()]
    write_rows(tmp_path / "b.jsonl", ROWS)
    states.append(source.state())
    seen = (tmp_path / "a.jsonl").stat()
    write_rows(tmp_path / "a.jsonl", [{"text": "c"}, {"text": "d"}])
    os.utime(tmp_path / "a.jsonl", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    states.append(source.state())
    assert len({str(state) for state in states}) == 3
    os.utime(tmp_path / "a.jsonl", ns=(5, 5))
    assert source.state() == states[-1]


def test_a_missing_file_is_known_without_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no such file"):
        FileSource(tmp_path / "rows.jsonl").check()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the stub of the Hub was asked for."""
    calls: list[Any] = []

    def load(*names: Any, **options: Any) -> Iterator[dict[str, Any]]:
        calls.append((names, options))
        return iter(ROWS)

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
    assert list(source.rows()) == [(f"owner/rows (train), row {n}", row) for n, row in enumerate(ROWS, start=1)]
    assert asked == [(("owner/rows", "small"), {"split": "train", "revision": "v1", "streaming": True})]


def test_its_state_has_the_commit_and_the_split(asked: list[Any]) -> None:
    state = HubSource(WANTED, "train").state()
    assert state[1:] == ["train", "abc"]
    assert asked == [("owner/rows", "v1")]
    assert state != HubSource(WANTED, "test").state()


def broken_stream() -> Iterator[dict[str, Any]]:
    yield ROWS[0]
    raise ConnectionError("the connection broke")


@pytest.mark.parametrize(
    "failure",
    [ValueError("Unknown split"), datasets.exceptions.DatasetNotFoundError("no such data set"), None],
    ids=["split", "name", "connection"],
)
def test_what_the_hub_refuses_is_one_clear_error(failure: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        if failure is not None:
            raise failure
        return broken_stream()

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"data.hub: cannot read 'owner/rows', split 'train': "):
        list(HubSource(WANTED, "train").rows())


def test_damaged_data_on_the_hub_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="cannot read 'owner/rows'"):
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
