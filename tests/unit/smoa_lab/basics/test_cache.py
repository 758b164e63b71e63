from __future__ import annotations

from pathlib import Path

import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from smoa_lab.basics.cache import cache_folder, content_of


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SMOA_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        (Unix, {"XDG_CACHE_HOME": "/cache"}, "/cache/smoa"),
        (Unix, {}, "/home/me/.cache/smoa"),
        (MacOS, {}, "/home/me/Library/Caches/smoa"),
    ],
)
def test_the_cache_is_where_smoa_0_1_had_it(
    platform: type, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SMOA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("platformdirs.PlatformDirs", platform)
    assert cache_folder() == Path(expected)


def test_a_content_is_the_same_under_another_name_and_another_one_is_not(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in "abc")
    for file, text in ((one, "text"), (same, "text"), (other, "tent")):
        file.write_text(text)
    assert content_of(one) == content_of(same) != content_of(other)
