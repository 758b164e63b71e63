from __future__ import annotations

from pathlib import Path

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.data.files import Columns, FileTask
from smoa_lab.data.records import Record
from smoa_lab.data.selection import Sizes, select
from smoa_lab.data.tasks import Task, find_task
from tests.support import lab


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(DataError, match="no task 'arc_ez'; did you mean 'arc_easy'"):
        find_task("arc_ez")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))


def task(name: str, train: int, test: int, reads: list[str] | None = None) -> Task:
    """A task of so many questions, which notes when it is read."""

    def read(part: str) -> list[Record]:
        if reads is not None:
            reads.append(f"{name}, {part}")
        return lab.questions(train if part == "train" else test, f"{name} {part}", name)

    return Task("commonsense", f"source of {name}", read)


def test_a_source_is_read_once_and_then_from_the_cache() -> None:
    reads: list[str] = []
    first = select({"a": task("a", 20, 5, reads)}, Sizes())
    again = select({"a": task("a", 20, 5, reads)}, Sizes())
    assert again.train == first.train
    assert again.test == first.test
    assert reads == ["a, train", "a, test"]


def test_a_cache_that_cannot_be_written_is_told_before_a_source_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "file"))
    reads: list[str] = []
    with pytest.raises(ConfigError, match=r"a-train-3\.jsonl: cannot be written \(Not a directory\)"):
        select({"a": task("a", 20, 5, reads)}, Sizes())
    assert reads == []


def test_a_file_of_ones_own_comes_before_a_task_of_that_name_and_is_never_cached(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("q,a\nSay it.,yes\n")
    own = FileTask(train=str(file), family="dialogue", columns=Columns(prompt="q", answer="a"))
    found = find_task("arc_easy", files={"arc_easy": own})
    assert found.family == "dialogue"
    assert [record.answer for record in select({"arc_easy": found}, Sizes(), validation_part=0).train] == ["yes"]
    file.write_text("q,a\nSay it.,no\n")
    assert [record.answer for record in select({"arc_easy": found}, Sizes(), validation_part=0).train] == ["no"]


def test_the_hub_is_a_source_of_the_sets_that_it_has() -> None:
    assert find_task("piqa", source="hub").source == "hub: ybisk/piqa"
    assert find_task("chain_sum", source="hub") is find_task("chain_sum")


def test_a_name_like_no_task_is_answered_with_all_of_them() -> None:
    with pytest.raises(DataError, match=r"no task 'zzz'; choose from arc_challenge, .*mine.*winogrande"):
        find_task("zzz", files={"mine": FileTask(train="mine.csv")})
