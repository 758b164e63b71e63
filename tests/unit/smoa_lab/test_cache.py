from __future__ import annotations

from pathlib import Path

import pytest

from smoa_lab.cache import cache_folder


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
