"""The rows of a study's tables: one entry's result each, from its stored trials alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np

from smoa.errors import DataError
from smoa_lab.basics.plain_json import finite
from smoa_lab.study.comparison import stored_finals, stored_search
from smoa_lab.study.plan import Tuned
from smoa_lab.study.report.results.statistics import (
    Difference,
    Interval,
    accuracy_difference,
    accuracy_interval,
    corrected,
    loss_difference,
    outcomes,
)
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import TrialStore

BY_TASK = "Accuracy % by task"
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
    elsewhere: float | None
    seconds: float | None
    loss_difference: Difference | None
    accuracy_difference: Difference | None


def commonest_machine(study: Study) -> Machine:
    """Device and threads of most final runs: those of others take another time for the same work."""
    store = TrialStore(study.folder)
    finals = [store.find(one) or {} for name in study.entries for one in store.names(f"final/{name}/")]
    return max(Counter(map(_machine, finals)).items(), key=itemgetter(1), default=((None, None), 0))[0]


def entry_row(study: Study, name: str, machine: Machine) -> Row | None:
    """The row of an entry, its seconds those on ``machine``; None before its first final run."""
    search = stored_search(study, name)
    finals = _finals(study, name)
    if not finals:
        return None
    reference = study.reference(study.entries[name].budget)
    found = outcomes(list(finals.values()))
    losses, accuracies = found.mean_loss(), found.accuracy()
    away = [result["elsewhere"] for result in finals.values() if result.get("elsewhere") is not None]
    timed = [result for result in finals.values() if result["seconds"] is not None and _machine(result) == machine]
    by_loss, by_accuracy = _differences(study, finals, reference) if name != reference else (None, None)
    return Row(
        entry=name,
        method=study.entries[name].method,
        budget=study.entries[name].budget,
        reference=reference,
        parameters=next(iter(finals.values()))["parameters"],
        learning_rate=search.learning_rate if search else study.entries[name].learning_rate,
        search=search,
        seeds=list(finals),
        loss=float(losses.mean()),
        loss_spread=_spread(losses),
        accuracy=float(accuracies.mean()),
        accuracy_spread=_spread(accuracies),
        accuracy_interval=accuracy_interval(found),
        task_accuracy=_by_task(list(finals.values())),
        elsewhere=float(np.mean(away)) if away else None,
        seconds=float(np.mean([result["seconds"] for result in timed])) if timed else None,
        loss_difference=by_loss,
        accuracy_difference=by_accuracy,
    )


def difference_cells(row: Row, found: Difference | None, scale: float, digits: int) -> tuple[str, str, str]:
    """Mean, interval and verdict as text; empty for the reference, and before a seed of it is finished."""
    if found is None:
        return "", "", "reference" if row.entry == row.reference else ""
    return (*found.signed(scale, digits), found.told)


def with_holm(rows: Sequence[Row]) -> list[Row]:
    """The differences of loss and accuracy corrected for all comparisons of a table."""
    found = corrected([one for row in rows for one in (row.loss_difference, row.accuracy_difference)])
    pairs = zip(found[::2], found[1::2], strict=True)
    return [
        replace(row, loss_difference=by_loss, accuracy_difference=by_accuracy)
        for row, (by_loss, by_accuracy) in zip(rows, pairs, strict=True)
    ]


def accuracy_by_task(rows: Sequence[Row], untouched: dict[str, Any] | None) -> list[list[str]]:
    """A table in percent, its header first, with the untouched model last; nothing where there is one task only."""
    names = list(rows[0].task_accuracy)
    if len(names) < 2:
        return []
    found = [(row.entry, row.task_accuracy) for row in rows]
    if untouched is not None:
        found.append(("untouched", {name: untouched["scores"][name]["accuracy"] for name in names}))
    shares = [(entry, [by_task[name] for name in names]) for entry, by_task in found]
    lines = [[entry, *(f"{100 * one:.1f}" for one in (*of, sum(of) / len(of)))] for entry, of in shares]
    return [["entry", *names, "mean"], *lines]


def untouched_sentence(untouched: dict[str, Any] | None) -> str:
    """The untouched model's scores in a sentence; nothing where it was not scored."""
    if untouched is None:
        return ""
    scores = untouched["scores"]["all"]
    told = f"The untouched model: loss {scores['gold_loss']:.4f}, accuracy {100 * scores['accuracy']:.1f} %"
    if scores["majority"] is not None:
        told += f"; the commonest label of each task is right in {100 * scores['majority']:.1f} %"
    if untouched.get("elsewhere") is not None:
        told += f"; its loss elsewhere is {untouched['elsewhere']:.3f}"
    return f"{told}."


def missing_sentence(study: Study, found: Iterable[str]) -> str:
    """The entries of the study that are not among those found, in a sentence; nothing without one."""
    missing = [name for name in study.entries if name not in set(found)]
    return f"Not run yet: {', '.join(missing)}." if missing else ""


def from_json(value: dict[str, Any]) -> Row:
    """A row of a stored summary: what :func:`as_json` wrote."""
    known = {key: math.nan if value[key] is None else value[key] for key in ("loss", "loss_spread")}
    search = value["search"]
    if search is not None:
        search = Tuned(**search | {"losses": {float(rate): loss for rate, loss in search["losses"].items()}})
    return Row(
        **value
        | known
        | {
            "search": search,
            "accuracy_interval": Interval(**value["accuracy_interval"]),
            **{key: _difference(value[key]) for key in ("loss_difference", "accuracy_difference")},
        }
    )


def _difference(value: dict[str, Any] | None) -> Difference | None:
    if value is None:
        return None
    known = {key: math.nan for key in ("mean", "low", "high") if value[key] is None}
    return Difference(**value | known)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain values, with null for what a diverged run left without a number."""
    return [finite(asdict(row)) for row in rows]


def _machine(result: dict[str, Any]) -> Machine:
    made = result.get("provenance", {})
    return made.get("device"), made.get("threads")


def _by_task(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of each task, the mean over seeds."""
    tasks = [name for name in results[0]["scores"] if name != "all"]
    return {name: float(np.mean([result["scores"][name]["accuracy"] for result in results])) for name in tasks}


def _finals(study: Study, name: str) -> dict[int, dict[str, Any]]:
    """The final runs of the study's seeds, by seed, at the learning rate that the search chose."""
    search = stored_search(study, name)
    wanted = search.learning_rate if search else study.entries[name].learning_rate
    finals = stored_finals(study, name, lambda rate: rate == wanted)
    return {result["config"]["training"]["seed"]: result for result in finals}


def _differences(
    study: Study, finals: dict[int, dict[str, Any]], reference: str
) -> tuple[Difference | None, Difference | None]:
    theirs = _finals(study, reference)
    shared = [seed for seed in finals if seed in theirs]
    if not shared:
        return None, None
    for seed in shared:
        check_paired(finals[seed], theirs[seed])
    pair = outcomes([finals[seed] for seed in shared]), outcomes([theirs[seed] for seed in shared])
    return loss_difference(*pair), accuracy_difference(*pair)


def check_paired(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise DataError unless both were asked the same questions, in the same tokens."""
    if one.get("sha256") != other.get("sha256") or one["questions"]["tokens"] != other["questions"]["tokens"]:
        raise DataError(
            f"{one.get('name')} and {other.get('name')} were scored on different questions or by different "
            "tokenizers, so they can't be compared; move the older one away and run smoa compare again"
        )


def _spread(values: Any) -> float:
    """The standard deviation over seeds; 0 for one seed, NaN where one diverged."""
    if not np.isfinite(values).all():
        return float("nan")
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
