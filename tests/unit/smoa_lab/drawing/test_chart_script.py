from __future__ import annotations

from pathlib import Path

import pytest

from smoa_lab.drawing import chart_script
from smoa_lab.drawing.chart_script import SCRIPT, lay_script, script


def test_the_script_is_one_file_that_imports_nothing() -> None:
    text = script()
    assert len(text) < 1_000_000
    assert not any(line.startswith(("import ", "export ")) for line in text.splitlines())
    assert "figure[data-chart]" in text


def test_a_script_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_script(tmp_path)
    assert (tmp_path / SCRIPT).read_text(encoding="utf-8") == script()
    monkeypatch.setattr(chart_script, "write_whole", lambda *args: pytest.fail("written again"))
    lay_script(tmp_path)


def test_the_script_of_another_version_is_replaced(tmp_path: Path) -> None:
    (tmp_path / SCRIPT).write_text("older")
    lay_script(tmp_path)
    assert (tmp_path / SCRIPT).read_text(encoding="utf-8") == script()
