"""One entry's result, from its stored trials alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from smoa.experiments.comparison.compare import Tuned, stored, stored_search
from smoa.experiments.comparison.statistics import (
    Difference,
    Interval,
    accuracy_difference,
    accuracy_interval,
    loss_difference,
    outcomes,
)
from smoa.experiments.comparison.study import Study


@dataclass(frozen=True)
class Row:
    """One entry: what it trained and reached over its seeds, and the differences to the reference of its budget."""

    entry: str
    budget: str
    reference: str
    parameters: int
    search: Tuned | None
    seeds: list[int]
    loss: float
    loss_spread: float
    accuracy: float
    accuracy_spread: float
    accuracy_interval: Interval
    elsewhere: float | None
    seconds: float
    loss_difference: Difference | None
    accuracy_difference: Difference | None


def entry_row(study: Study, name: str) -> Row | None:
    """The row of an entry; None before its first final run."""
    search = stored_search(study, name)
    finals = _finals(study, name)
    if not finals:
        return None
    reference = study.reference(study.entries[name].budget)
    found = outcomes(list(finals.values()))
    losses, accuracies = found.mean_loss(), found.accuracy()
    away = [result["elsewhere"] for result in finals.values() if result.get("elsewhere") is not None]
    by_loss, by_accuracy = _differences(study, finals, reference) if name != reference else (None, None)
    return Row(
        entry=name,
        budget=study.entries[name].budget,
        reference=reference,
        parameters=next(iter(finals.values()))["parameters"],
        search=search,
        seeds=list(finals),
        loss=float(losses.mean()),
        loss_spread=_spread(losses),
        accuracy=float(accuracies.mean()),
        accuracy_spread=_spread(accuracies),
        accuracy_interval=accuracy_interval(found),
        elsewhere=float(np.mean(away)) if away else None,
        seconds=float(np.mean([result["seconds"] for result in finals.values()])),
        loss_difference=by_loss,
        accuracy_difference=by_accuracy,
    )


def _finals(study: Study, name: str) -> dict[int, dict[str, Any]]:
    """The final runs by seed, at the learning rate that the search chose."""
    search = stored_search(study, name)
    wanted = search.learning_rate if search else study.entries[name].learning_rate
    results = [one["config"]["training"] | {"result": one} for one in stored(study, "final", name)]
    return {one["seed"]: one["result"] for one in results if one["learning_rate"] == wanted}


def _differences(
    study: Study, finals: dict[int, dict[str, Any]], reference: str
) -> tuple[Difference | None, Difference | None]:
    theirs = _finals(study, reference)
    shared = [seed for seed in finals if seed in theirs]
    if not shared:
        return None, None
    pair = outcomes([finals[seed] for seed in shared]), outcomes([theirs[seed] for seed in shared])
    return loss_difference(*pair), accuracy_difference(*pair)


def _spread(values: Any) -> float:
    """The standard deviation over seeds; 0 for one seed, NaN where one diverged."""
    if not np.isfinite(values).all():
        return float("nan")
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
