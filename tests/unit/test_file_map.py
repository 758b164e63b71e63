"""The file map of docs/design.md is the one that the modules' first lines give."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "figures" / "file_map.py"))


def test_the_file_map_is_up_to_date() -> None:
    assert SCRIPT["page"]() == SCRIPT["PAGE"].read_text(encoding="utf-8"), "run python docs/figures/file_map.py"


def test_a_module_without_a_docstring_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bare\.py: has no docstring"):
        SCRIPT["first_line"](tmp_path / "bare.py")
