"""The records of one run: tasks mixed, shuffled and cut to size, with an account of what was used."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smoa.errors import DataError
from smoa_lab.data.files import Family
from smoa_lab.data.records import Record, Split, content_hash
from smoa_lab.data.tasks import Task, load_task


@dataclass(frozen=True)
class Selection:
    """Records of a run, the family of each task, and an account: per task its source, sizes and what was dropped, and
    the content hashes of the three parts as used."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    families: dict[str, Family]
    account: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How many examples of each part; None means all. ``test`` counts per task, the others over all tasks."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


def select(tasks: Mapping[str, Task], sizes: Sizes, validation_part: float = 0.05, seed: int = 0) -> Selection:
    """Training and validation records are a sample of all tasks together, test records one of each task.

    Raises:
        DataError: no training examples are left, or a source cannot be loaded.
    """
    splits = {name: load_task(name, task, validation_part) for name, task in tasks.items()}
    train = _sample([record for split in splits.values() for record in split.train], sizes.train, seed)
    validation = _sample([r for split in splits.values() for r in split.validation], sizes.validation, seed)
    test = [record for split in splits.values() for record in _sample(split.test, sizes.test, seed)]
    if not train:
        raise DataError(f"data.tasks: {', '.join(tasks)} leave no training examples")
    account = {
        "tasks": {name: _task_account(tasks[name], split) for name, split in splits.items()},
        "used": {
            part: {"examples": len(records), "sha256": content_hash(records)}
            for part, records in (("train", train), ("validation", validation), ("test", test))
        },
    }
    return Selection(train, validation, test, {name: task.family for name, task in tasks.items()}, account)


def used_content(records: Selection) -> str:
    """What changes when the records that a run uses do."""
    return " ".join(part["sha256"] for part in records.account["used"].values())


def _task_account(task: Task, split: Split) -> dict[str, Any]:
    return {
        "source": task.source,
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "dropped_also_in_test": split.also_in_test,
        "dropped_repeated": split.repeated,
    }


def _sample(records: list[Record], size: int | None, seed: int) -> list[Record]:
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    return shuffled if size is None else shuffled[:size]
