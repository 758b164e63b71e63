"""The table of what can be adapted is the one that trying gives."""

from __future__ import annotations

import runpy
from pathlib import Path

import peft
import pytest

pytestmark = pytest.mark.skipif(not hasattr(peft, "HiraConfig"), reason="this PEFT has no HiRA")
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "figures" / "layer_kinds.py"))


def test_the_table_is_up_to_date() -> None:
    assert SCRIPT["page"]() == SCRIPT["PAGE"].read_text(encoding="utf-8"), "run python docs/figures/layer_kinds.py"


def test_every_kind_of_layer_has_a_row() -> None:
    assert SCRIPT["missing"]() == []
