from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smoa.atomic import SAVE, check_place, new_file, new_files, new_folder, recover, write_whole
from smoa.errors import ConfigError
from tests.support.killing import killed_at


def fill(folder: Path, text: str) -> None:
    with new_files(folder) as temporary:
        assert temporary.name == folder.resolve().name, "which names a repository on the Hub"
        (temporary / "a").write_text(text)
        (temporary / "b.json").write_text(text)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "c").write_text(text)


def texts(folder: Path) -> set[str]:
    """What the visible files hold."""
    return {file.read_text() for file in folder.rglob("*") if file.is_file() and "/." not in str(file)}


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


@pytest.mark.parametrize("writer", [new_folder, new_files])
def test_a_folder_that_failed_leaves_nothing(writer: Callable[[Path], object], tmp_path: Path) -> None:
    def interrupted() -> None:
        with writer(tmp_path / "model") as temporary:  # type: ignore[attr-defined]
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
    with pytest.raises(ConfigError, match="another process created it"):
        ours(keep_existing=False)
    with pytest.raises(ConfigError, match="exists"):
        ours(keep_existing=False)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("writer", [new_files, new_folder])
def test_weights_get_the_mode_of_new_files(writer: Callable[[Path], Any], tmp_path: Path) -> None:
    with writer(tmp_path / "new") as folder:
        (folder / "config.json").touch()
        (folder / "weights.safetensors").touch(0o600)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "new").iterdir()}
    assert modes == dict.fromkeys(("config.json", "weights.safetensors"), modes["config.json"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("first", [True, False], ids=["first save", "over another"])
def test_a_kill_at_any_call_leaves_the_old_files_or_the_new_ones(tmp_path: Path, first: bool) -> None:
    folder, found, between = tmp_path / "room" / "folder", [], 0
    for number in range(1, 1000):
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        if not first:
            fill(folder, "old")
        killed = killed_at(number, lambda: fill(folder, "new"), lambda event, call: str(folder.parent) in str(call))
        between += (folder / SAVE).exists()
        recover(folder / "inner" if number % 2 else folder)  # whoever loads only what is in the inner one
        found.append(texts(folder))
        if not killed:
            break
    assert found[0] == (set() if first else {"old"})
    assert found[-1] == {"new"}
    assert found == sorted(found, key=lambda texts: texts == {"new"}), "once the new ones are there they stay"
    assert all(texts in (found[0], {"new"}) for texts in found)
    assert between > 3, "kills between the moves"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b.json", "inner"]


def test_what_others_hold_in_the_folder_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    (folder / "runs").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    with (folder / "train.log").open("a") as log, (folder / "runs" / "events").open("a") as events:
        fill(Path(), "new")
        log.write("after")
        events.write("after")
    Path("note.txt").touch()
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    assert names == {"a", "b.json", "inner/c", "note.txt", "pipe", "runs/events", "train.log"}
    assert (folder / "train.log").read_text() == (folder / "runs" / "events").read_text() == "after"


def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point, or a folder whose parent is not writable."""
    folder, calls = tmp_path / "folder", []
    fill(folder, "old")
    for name in ("rename", "replace"):
        original = getattr(Path, name)

        def noted(self: Path, target: Path, original: Callable[[Path, Path], Path] = original) -> Path:
            calls.extend([self, target])
            return original(self, target)

        monkeypatch.setattr(Path, name, noted)
    fill(folder, "new")
    assert texts(folder) == {"new"}
    assert calls
    assert all(folder in path.parents for path in calls), "all is done inside the folder"


def test_a_save_that_is_killed_is_finished_before_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / SAVE).mkdir(parents=True)
    (folder / SAVE / "other").write_text("killed")
    (folder / SAVE / "a").write_text("killed")
    fill(folder, "new")
    assert (folder / "a").read_text() == "new"
    assert (folder / "other").read_text() == "killed"
    assert not (folder / SAVE).exists()


def fill_often(folder: Path, text: str) -> None:
    for _ in range(50):
        fill(folder, text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_a_save_began_that_was_killed_long_ago_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = {".smoa-old": tmp_path.name, ".smoa-new": tmp_path.name, ".smoa-mine": "other"}
    for name, inside in names.items():
        (tmp_path / name / inside).mkdir(parents=True)
        (tmp_path / name / inside / "half").write_text("half")
    for name in (".smoa-old", ".smoa-mine"):
        os.utime(tmp_path / name, (0, 0))
    with new_files(tmp_path) as room:
        (room / "whole").write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {".smoa-new", ".smoa-mine", "whole"}


def test_processes_may_save_into_one_folder_at_once(tmp_path: Path) -> None:
    folder, context = tmp_path / "folder", multiprocessing.get_context("fork")
    processes = [context.Process(target=fill_often, args=(folder, text)) for text in ("one", "two", "three")]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        recover(folder)  # as a load does
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(texts(folder)) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b.json", "inner"]


def test_what_lies_in_a_downloaded_folder_writes_nothing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "adapter"
    (folder / SAVE / "sub").mkdir(parents=True)
    (folder / SAVE / "sub" / "keys").write_text("bad")
    (folder / SAVE / "link").symlink_to("/tmp")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    recover(folder)
    with pytest.raises(ConfigError, match="in the way"):
        fill(folder, "new")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_save_follows_links_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with new_files(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("new")
    assert (tmp_path / "elsewhere" / "a").read_text() == "new"
    assert not (folder / SAVE).exists()


def test_a_link_in_the_place_of_a_killed_save_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / SAVE).symlink_to(tmp_path / "mine")
    recover(tmp_path / "adapter")
    assert (tmp_path / "mine" / "letter").exists()


def test_what_another_user_left_in_a_shared_folder_is_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / SAVE).mkdir()
    (tmp_path / SAVE / "a").write_text("theirs")
    monkeypatch.setattr("os.getuid", lambda: -1)
    recover(tmp_path)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="in the way"), new_files(tmp_path) as temporary:
        (temporary / "a").write_text("new")
