"""From tasks to the records of one run: mixed, cut to size, counted, and normalized into the cache once."""

from __future__ import annotations

from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.data.records import Record, content_hash
from smoa_lab.data.selection import Sizes, select
from smoa_lab.data.tasks import Task
from tests.support import lab


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


def test_training_is_a_sample_of_all_tasks_and_every_task_is_tested() -> None:
    chosen = select({"a": task("a", 20, 9), "b": task("b", 60, 9)}, Sizes(30, 4, 5), validation_part=0.1)
    assert [len(part) for part in (chosen.train, chosen.validation, chosen.test)] == [30, 4, 10]
    assert {record.task for record in chosen.train} == {"a", "b"}
    assert [record.task for record in chosen.test] == ["a"] * 5 + ["b"] * 5
    assert chosen.families == {"a": "commonsense", "b": "commonsense"}


def test_the_account_tells_source_sizes_and_hashes() -> None:
    chosen = select({"a": task("a", 20, 9)}, Sizes(), validation_part=0.1)
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
    first, again, other = (select(tasks, Sizes(train=10), seed=seed).train for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_tasks_that_leave_nothing_to_train_on_are_refused() -> None:
    train = lab.questions(6, "a")
    own = Task("commonsense", "own", lambda part: train, cached=False)  # the test part has them all
    with pytest.raises(DataError, match=r"data\.tasks: a leave no training examples"):
        select({"a": own}, Sizes())
