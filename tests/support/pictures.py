"""Pictures that are not drawn: drawing one takes longer than training a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smoa_lab.pages import run_report
from smoa_lab.study import report


@pytest.fixture(scope="module")
def quick_pictures() -> Iterator[None]:
    """The file of a picture contains what would be drawn."""

    def save(chart: Any, file: Path) -> None:
        file.write_text(json.dumps(chart.to_dict()), encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        for module in (run_report, report):
            patch.setattr(module, "save_picture", save)
        yield
