from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from smoa.atomic import check_place, new_file, new_folder, recover, replaced_folder, write_whole
from smoa.errors import ConfigError
from tests.support.killing import killed_at


def fill(folder: Path, text: str) -> None:
    with replaced_folder(folder) as temporary:
        (temporary / "a").write_text(text)
        (temporary / "b").write_text(text)


def texts(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.iterdir()}


def test_a_place_is_tried_and_nothing_is_left_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_place(tmp_path / "file")
    check_place(tmp_path / "a" / "b", is_new=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    refused = {"file/x": "Not a directory", "": "is a folder", "/proc/x": "No such file or directory"}
    for place, reason in refused.items():
        with pytest.raises(ConfigError, match=rf"cannot be written \({reason}\); choose another place"):
            check_place(tmp_path / place)
    with pytest.raises(ConfigError, match="file: exists and is not overwritten; choose another name"):
        check_place(tmp_path / "file", is_new=True)


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


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with new_file(tmp_path / "deep" / "file.txt") as temporary:
        temporary.write_text("new")
        assert temporary.suffix != ".txt", "whoever lists the folder must not take it for the file"
        assert not (tmp_path / "deep" / "file.txt").exists()
    assert texts(tmp_path / "deep") == {"new"}


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_folder(target) as temporary:
        (temporary / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("writer", [new_folder, replaced_folder])
def test_a_folder_that_failed_leaves_nothing(writer: Callable[[Path], object], tmp_path: Path) -> None:
    def interrupted() -> None:
        with writer(tmp_path / "model") as temporary:  # type: ignore[attr-defined]
            (temporary / "half").write_text("h")
            raise OSError("no space left on disk")

    with pytest.raises(OSError, match="disk"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_finished_first_is_kept_or_refused(tmp_path: Path) -> None:
    def ours(keep_existing: bool) -> None:
        with new_folder(tmp_path / "data", keep_existing) as temporary:
            (temporary / "ours").touch()
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "theirs").touch()

    ours(keep_existing=True)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["theirs"]
    (tmp_path / "data").rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match="another process created it"):
        ours(keep_existing=False)
    with pytest.raises(ConfigError, match="exists"):
        ours(keep_existing=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    folder, found, between = tmp_path / "room" / "folder", [], 0
    for number in range(1, 1000):
        fill(folder, "old")
        killed = killed_at(number, lambda: fill(folder, "new"), lambda event, call: str(folder.parent) in str(call))
        between += not folder.exists()
        recover(folder)
        found.append(texts(folder))
        if not killed:
            break
    assert found[0] == {"old"}
    assert found[-1] == {"new"}
    assert found == sorted(found, key=str, reverse=True), "once the new one is there it stays"
    assert between == 1, "the kill between the two renames"


def test_a_folder_is_put_back_only_where_there_is_none(tmp_path: Path) -> None:
    old = tmp_path / ".folder.smoa-old"
    recover(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    old.mkdir()
    (old / "a").write_text("old")
    recover(tmp_path / "folder")
    assert texts(tmp_path / "folder") == {"old"}
    old.mkdir()
    recover(tmp_path / "folder")
    assert texts(tmp_path / "folder") == {"old"}
    fill(tmp_path / "folder", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_rename_that_fails_halfway_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "folder", Path.rename
    fill(folder, "old")

    def failing(self: Path, target: Path) -> Path:
        if target == folder and self.name == "folder":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        fill(folder, "new")
    assert texts(folder) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def immovable(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let renames of the folder fail with this error."""
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == folder:
            raise OSError(number, os.strerror(number))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM])
def test_in_a_folder_that_cannot_be_renamed_the_files_are_replaced(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    fill(folder, "old")
    for name in ("kept", "removed"):
        (folder / name).write_text(name)
    kept, held = (folder / "kept").stat(), folder.stat().st_ino
    immovable(folder, number, monkeypatch)
    with replaced_folder(folder) as temporary:
        assert (temporary / "a").read_text() == "old"
        (temporary / "a").write_text("new")
        (temporary / "removed").unlink()
        (temporary / "inner").mkdir()
        (temporary / "inner" / "c").write_text("new")
        (folder / "theirs").write_text("written meanwhile")
    found = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert found == {"a": "new", "b": "old", "kept": "kept", "inner/c": "new", "theirs": "written meanwhile"}
    assert folder.stat().st_ino == held
    assert (folder / "kept").stat() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_another_error_of_a_rename_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "folder", "old")
    immovable(tmp_path / "folder", errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        fill(tmp_path / "folder", "new")
    assert texts(tmp_path / "folder") == {"old"}


def test_a_folder_whose_parent_is_not_writable_is_replaced_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    fill(folder, "old")
    immovable(folder, errno.EACCES, monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with replaced_folder(folder) as temporary:
        assert tmp_path not in temporary.parents
        (temporary / "a").write_text("new")
    assert texts(folder) == {"old", "new"}


def test_json_is_replaced_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace, order = tmp_path / "folder", Path.replace, []
    folder.mkdir()
    immovable(folder, errno.EBUSY, monkeypatch)

    def noted(self: Path, target: Path) -> Path:
        order.append(str(target.relative_to(folder)))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    with replaced_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        for name in ("config.json", "weights", "inner/config.json", "inner/weights"):
            (temporary / name).touch()
    assert order == ["weights", "config.json", "inner/weights", "inner/config.json"]


def test_a_load_between_the_two_renames_does_not_stop_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename, loads = tmp_path / "folder", Path.rename, []
    fill(folder, "old")

    def meanwhile(self: Path, target: Path) -> Path:
        done = rename(self, target)
        if target.name == ".folder.smoa-old" and not loads:
            loads.append(recover(folder))
        return done

    monkeypatch.setattr(Path, "rename", meanwhile)
    fill(folder, "new")
    assert loads
    assert texts(folder) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
