from __future__ import annotations

from pathlib import Path

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.data.rows import Row, content_hash
from smoa_lab.data.tasks import Columns, FileTask, Task, find_task, select
from tests.support import lab


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))


def task(name: str, train: int, test: int, reads: list[str] | None = None) -> Task:
    """A task of so many questions, which notes when it is read."""

    def read(part: str) -> list[Row]:
        if reads is not None:
            reads.append(f"{name}, {part}")
        return lab.questions(train if part == "train" else test, f"{name} {part}", name)

    return Task(f"source of {name}", read, cached=True)


def test_a_source_is_read_once_and_then_from_the_cache() -> None:
    reads: list[str] = []
    first = select({"a": task("a", 20, 5, reads)}, {})
    again = select({"a": task("a", 20, 5, reads)}, {})
    assert again.train == first.train
    assert again.test == first.test
    assert reads == ["a, train", "a, test"]


def test_a_cache_that_cannot_be_written_is_told_before_a_source_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "file"))
    reads: list[str] = []
    with pytest.raises(ConfigError, match=r"a-train-4\.jsonl: cannot be written \(Not a directory\)"):
        select({"a": task("a", 20, 5, reads)}, {})
    assert reads == []


def test_a_file_of_ones_own_comes_before_a_task_of_that_name_and_is_never_cached(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("q,a\nSay it.,yes\n")
    own = FileTask(train=str(file), columns=Columns(prompt="q", answer="a"))
    found = find_task("arc_easy", files={"arc_easy": own})
    assert [record.completion for record in select({"arc_easy": found}, {}, validation_part=0).train] == ["yes"]
    file.write_text("q,a\nSay it.,no\n")
    assert [record.completion for record in select({"arc_easy": found}, {}, validation_part=0).train] == ["no"]


def test_an_unknown_task_is_answered_with_the_nearest_or_all_of_them() -> None:
    with pytest.raises(DataError, match="no task 'arc_ez'; did you mean 'arc_easy'"):
        find_task("arc_ez")
    with pytest.raises(DataError, match=r"no task 'zzz'; choose from arc_challenge, .*mine.*winogrande"):
        find_task("zzz", files={"mine": FileTask(train="mine.csv")})


def test_training_is_a_sample_of_all_tasks_and_every_task_is_tested() -> None:
    chosen = select(
        {"a": task("a", 20, 9), "b": task("b", 60, 9)}, {"train": 30, "validation": 4, "test": 5}, validation_part=0.1
    )
    assert [len(part) for part in (chosen.train, chosen.validation, chosen.test)] == [30, 4, 10]
    assert {record.task for record in chosen.train} == {"a", "b"}
    assert [record.task for record in chosen.test] == ["a"] * 5 + ["b"] * 5


def test_no_task_trains_on_the_test_questions_of_another() -> None:
    test = lab.questions(5, "test")
    a = Task("a", lambda part: test if part == "test" else lab.questions(9, "a"))
    b = Task("b", lambda part: [] if part == "test" else [*lab.questions(9, "b"), *test])
    chosen = select({"a": a, "b": b}, {})
    assert not {row.content for row in chosen.test} & {row.content for row in chosen.train + chosen.validation}
    assert [of["dropped_also_in_test"] for of in chosen.account["tasks"].values()] == [0, 5]


def test_the_account_tells_source_sizes_and_hashes() -> None:
    chosen = select({"a": task("a", 20, 9)}, {}, validation_part=0.1)
    counted = {"train": 18, "validation": 2, "test": 9}
    assert chosen.account["tasks"]["a"] == counted | {
        "source": "source of a",
        "dropped_also_in_test": 0,
        "dropped_repeated": 0,
    }
    for part, number in counted.items():
        used = chosen.account["used"][part]
        assert used == {"examples": number, "sha256": content_hash(getattr(chosen, part))}


def test_the_same_seed_takes_the_same_records_and_another_takes_others() -> None:
    tasks = {"a": task("a", 50, 5)}
    first, again, other = (select(tasks, {"train": 10}, seed=seed).train for seed in (0, 0, 1))
    assert first == again
    assert first != other
