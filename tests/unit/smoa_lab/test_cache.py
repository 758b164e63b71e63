from __future__ import annotations

from pathlib import Path

import pytest

from smoa.files.saving import new_folder
from smoa_lab.cache import cache_folder, write_whole


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_folder(target) as temporary:
        (temporary / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "model") as temporary:
            (temporary / "half").write_text("h")
            raise OSError("no space left on disk")

    with pytest.raises(OSError, match="disk"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    write_whole(file, "old")

    def full(self: Path, *args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
