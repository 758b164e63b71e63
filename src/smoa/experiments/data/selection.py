"""The records of one run: tasks mixed, shuffled and cut to size, with an account of what they are."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from smoa.errors import DataError
from smoa.experiments.data.records import Record, content_hash
from smoa.experiments.data.tasks import TASKS, load_task


@dataclass(frozen=True)
class Selection:
    """Records of a run and, per task, source, sizes, what was dropped; content hashes of the three parts as used."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    account: dict[str, Any]


def select(
    tasks: list[str],
    train_examples: int | None,
    validation_examples: int | None,
    test_examples: int | None,
    validation_part: float,
    seed: int,
) -> Selection:
    """Training and validation records are a sample of all tasks together, test records one of each task.

    Raises:
        DataError: a part that is asked for is empty.
    """
    splits = {name: load_task(name, validation_part) for name in tasks}
    train = _sample([record for split in splits.values() for record in split.train], train_examples, seed)
    validation = _sample(
        [record for split in splits.values() for record in split.validation], validation_examples, seed
    )
    test = [record for split in splits.values() for record in _sample(split.test, test_examples, seed)]
    if not train:
        raise DataError(f"data.tasks: {', '.join(tasks)} leave no training examples")
    account = {
        "tasks": {
            name: {
                "source": TASKS[name].source,
                "train": len(split.train),
                "validation": len(split.validation),
                "test": len(split.test),
                "dropped_also_in_test": split.also_in_test,
                "dropped_repeated": split.repeated,
            }
            for name, split in splits.items()
        },
        "used": {
            part: {"examples": len(records), "sha256": content_hash(records)}
            for part, records in (("train", train), ("validation", validation), ("test", test))
        },
    }
    return Selection(train, validation, test, account)


def _sample(records: list[Record], size: int | None, seed: int) -> list[Record]:
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    return shuffled if size is None else shuffled[:size]
