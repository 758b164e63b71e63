"""The results of a study's entries, a row each, from its stored trials alone, with differences between entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from smoa.errors import DataError
from smoa_lab.basics.plain import finite
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.search import Tuned
from smoa_lab.study.statistics import (
    Difference,
    Floats,
    Interval,
    accuracy_difference,
    accuracy_interval,
    check_paired,
    corrected,
    loss_difference,
    outcomes,
)
from smoa_lab.study.study import Study
from smoa_lab.study.trials import Result

Machine = tuple[str | None, int | None]


@dataclass(frozen=True)
class Row:
    """One entry: what it trained and reached over its seeds, and the differences to the reference of its budget."""

    entry: str
    method: str
    budget: str
    reference: str
    parameters: int
    learning_rate: float
    search: Tuned | None
    seeds: list[int]
    loss: float
    loss_spread: float
    accuracy: float
    accuracy_spread: float
    accuracy_interval: Interval
    task_accuracy: dict[str, float]
    seconds: float | None
    loss_difference: Difference | None
    accuracy_difference: Difference | None


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain values, with null for what a diverged run left without a number."""
    return [finite(asdict(row)) for row in rows]


def rows_of(comparison: Comparison) -> list[Row]:
    """The rows of all entries with a final run, by budget and loss.

    Raises:
        DataError: no final run is finished yet.
        ConfigError: a run was run with other settings than the study's.
    """
    study, store = comparison.study, comparison.store
    searches = {name: comparison.stored_search(name) for name in study.entries}
    finals: dict[str, dict[int, Result]] = {}
    for name, search in searches.items():
        chosen = search.learning_rate if search else study.entries[name].learning_rate
        finals[name] = comparison.stored_finals(name, chosen)
    made = [store.find(run) or {} for name in study.entries for run in store.names(f"final/{name}/")]
    machine = Counter(map(_machine, made)).most_common(1)  # others take another time for the same work
    rows = [_row(study, name, searches[name], finals, machine[0][0]) for name in study.entries if finals[name]]
    if not rows:
        raise DataError(f"{study.folder}: no final run is finished yet; run smoa compare on this study first")
    rows.sort(key=lambda row: (row.budget, row.loss))
    corrected_rows = []
    for _, group in groupby(rows, lambda row: row.budget):
        of_budget = list(group)
        pairs = corrected([each for row in of_budget for each in (row.loss_difference, row.accuracy_difference)])
        corrected_rows += [
            replace(row, loss_difference=loss, accuracy_difference=accuracy)
            for row, loss, accuracy in zip(of_budget, pairs[::2], pairs[1::2], strict=True)
        ]
    return corrected_rows


def _machine(run: Result) -> Machine:
    """Device and threads of a run."""
    made = run.get("provenance", {})
    return made.get("device"), made.get("threads")


def _row(study: Study, name: str, search: Tuned | None, finals: dict[str, dict[int, Result]], machine: Machine) -> Row:
    runs, reference = list(finals[name].values()), study.reference(name)
    reached = outcomes(runs)
    losses, accuracies = reached.mean_loss(), reached.accuracy()
    timed = [run["seconds"] for run in runs if run["seconds"] is not None and _machine(run) == machine]
    tasks = [task for task in runs[0]["scores"] if task != "all"]
    shared = [seed for seed in finals[name] if seed in finals[reference]] if name != reference else []
    pairs = [(finals[name][seed], finals[reference][seed]) for seed in shared]
    for run in (*runs, *(theirs for _, theirs in pairs)):
        check_paired(run, runs[0])
    both = [outcomes(side) for side in zip(*pairs, strict=True)]
    return Row(
        entry=name,
        method=study.entries[name].method,
        budget=study.entries[name].budget,
        reference=reference,
        parameters=runs[0]["parameters"],
        learning_rate=search.learning_rate if search else study.entries[name].learning_rate,
        search=search,
        seeds=list(finals[name]),
        loss=float(losses.mean()),
        loss_spread=_spread(losses),
        accuracy=float(accuracies.mean()),
        accuracy_spread=_spread(accuracies),
        accuracy_interval=accuracy_interval(reached),
        task_accuracy={task: float(np.mean([run["scores"][task]["accuracy"] for run in runs])) for task in tasks},
        seconds=float(np.mean(timed)) if timed else None,
        loss_difference=loss_difference(*both) if both else None,
        accuracy_difference=accuracy_difference(*both) if both else None,
    )


def _spread(values: Floats) -> float:
    """The standard deviation over seeds; 0 for one seed, NaN where one diverged."""
    if not np.isfinite(values).all():
        return float("nan")
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
