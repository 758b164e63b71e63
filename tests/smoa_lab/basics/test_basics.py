"""What the whole lab uses: cache, names, positions, sections, and warnings of other libraries."""

import errno
import importlib
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig

import smoa_lab
from smoa.errors import ConfigError
from smoa_lab.base_models import positions_of
from smoa_lab.basics.files import cache_folder, new_file, new_folder, write_whole
from smoa_lab.basics.values import finite, json_text, portable
from tests.support.lab import killed_at


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SMOA_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_only_warnings_between_other_libraries_are_silenced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(smoa_lab)
        for name in ("gradient_checkpointing_enable", "is_gradient_checkpointing"):
            warnings.warn(f"`{name}` is deprecated and will go", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning, match="something else"):
            warnings.warn("something else", FutureWarning, stacklevel=1)


def test_positions_are_the_configs_own_or_not_limited() -> None:
    assert positions_of(GPT2Config(n_positions=100)) == 100
    assert positions_of(LlamaConfig(max_position_embeddings=100)) == 100
    assert positions_of(BloomConfig()) is None


def test_what_is_not_finite_becomes_none_wherever_it_is() -> None:
    values = {"loss": math.nan, "rows": [1.5, -math.inf, {"deep": (math.inf, "nan", None, True)}]}
    assert finite(values) == {"loss": None, "rows": [1.5, None, {"deep": [None, "nan", None, True]}]}


def test_the_text_is_json_that_others_can_read() -> None:
    text = json_text({"loss": math.nan, "name": "ü"})
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "name": "ü"}
    assert text == '{\n  "loss": null,\n  "name": "ü"\n}'


def test_of_absolute_paths_only_the_last_name_is_left() -> None:
    values = {"name": "/home/me/base", "files": {"mine": ["~/data/train.jsonl", "C:\\data\\test.csv"]}}
    assert portable(values) == {"name": "base", "files": {"mine": ["train.jsonl", "test.csv"]}}


# files and folders that appear whole


def texts(folder: Path) -> set[str]:
    """What the visible files hold."""
    return {file.read_text() for file in folder.rglob("*") if file.is_file() and "/." not in str(file)}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    write_whole(file, "old")

    def full(self: Path, *args: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, str]] = []
    monkeypatch.setattr(
        "os.fsync", lambda _: found.append({path.name: path.read_text() for path in tmp_path.iterdir()})
    )
    write_whole(tmp_path / "metrics.json", "new")
    (flushed,) = found
    assert "metrics.json" not in flushed
    assert list(flushed.values()) == ["new"]


def test_a_folder_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "model") as temporary:
            (temporary / "half").write_text("h")
            raise OSError("no space left on disk")

    with pytest.raises(OSError, match="disk"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_when_it_is_complete_and_one_that_is_there_first_is_kept_or_refused(tmp_path: Path) -> None:
    def ours(keep_existing: bool) -> None:
        with new_folder(tmp_path / "data", keep_existing) as temporary:
            (temporary / "ours").touch()
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "theirs").touch()

    with new_folder(tmp_path / "model") as temporary, new_file(tmp_path / "deep" / "file.txt") as file:
        (temporary / "weights").write_text("w")
        file.write_text("new")
        assert file.suffix != ".txt", "whoever lists the folder must not take it for the file"
        assert not (tmp_path / "model").exists()
        assert not (tmp_path / "deep" / "file.txt").exists()
    assert texts(tmp_path) == {"w", "new"}
    ours(keep_existing=True)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["theirs"]
    (tmp_path / "data").rename(tmp_path / "aside")
    with pytest.raises(OSError, match="data"):
        ours(keep_existing=False)
    with pytest.raises(ConfigError, match="exists"):
        ours(keep_existing=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_at_any_call_leaves_no_folder_or_a_whole_one(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "room" / "model") as temporary:
            (temporary / "a").write_text("new")
            (temporary / "b").write_text("new")

    found: list[list[str]] = []
    for number in range(1, 1000):
        shutil.rmtree(tmp_path / "room", ignore_errors=True)
        killed = killed_at(number, write, lambda _, call: str(tmp_path) in str(call))
        found.append([path.name for path in sorted((tmp_path / "room").glob("model/*"))])
        if not killed:
            break
    assert len(found) > 5
    assert all(names in ([], ["a", "b"]) for names in found)
    assert found[-1]
