"""The results of a study's entries, from the folders of its final runs, with differences between entries."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from smoa.errors import DataError
from smoa_lab.basics.plain import finite
from smoa_lab.study.comparison import Comparison, measured
from smoa_lab.study.plan import Metrics
from smoa_lab.study.search import Chosen, best_of
from smoa_lab.study.statistics import Difference, Floats, corrected, paired_difference, seed_error, variances_of
from smoa_lab.study.study import Job
from smoa_lab.training.run_folder import RunFolder

RowKey = tuple[str, int]
"""A row's digest, and its number among equal ones."""


@dataclass(frozen=True)
class Measure:
    """What is compared: a ``field`` of each held-out row, per token or per row; ``sign`` is 1 where higher is better.
    It is shown ``scale`` times as large, with so many digits."""

    title: str
    field: str
    per_token: bool
    sign: int
    scale: float
    digits: int


LOSS = Measure("loss", "after", True, -1, 1, 4)
OF_CHOICES = Measure("accuracy %", "right_after", False, 1, 100, 1)
OF_PREFERENCES = (
    Measure("DPO loss", "dpo_loss", False, -1, 1, 4),
    Measure("margin", "margin", False, 1, 1, 3),
    Measure("won %", "won", False, 1, 100, 1),
)
MEASURES = {each.title: each for each in (LOSS, OF_CHOICES, *OF_PREFERENCES)}
"""All measures by their titles."""


def measures_of(row: Mapping[str, Any]) -> Sequence[Measure]:
    """What is compared on rows like this one, first what decides."""
    if "dpo_loss" in row:
        return OF_PREFERENCES
    return (LOSS, OF_CHOICES) if "right_after" in row else (LOSS,)


@dataclass(frozen=True)
class FinalRun:
    """A finished run and its held-out rows."""

    folder: RunFolder
    metrics: Metrics
    rows: dict[RowKey, dict[str, Any]]


def read_rows(file: Path) -> dict[RowKey, dict[str, Any]]:
    """The held-out rows of a run."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return {(row["digest"], row["copy"]): row for row in map(json.loads, lines)}


@dataclass(frozen=True)
class Result:
    """One entry: what it trained and reached over its seeds, and the differences to the reference of its budget.

    ``values`` are mean and standard deviation over seeds by measure; ``differences`` are over the ``paired`` seeds,
    those that the reference has too; ``share`` is its number of parameters as a part of the reference's; ``rows``
    counts the held-out ones.
    """

    entry: str
    method: str
    budget: str
    reference: str
    parameters: int
    share: float
    chosen: Chosen
    seeds: list[int]
    paired: list[int]
    diverged: int
    rows: int
    values: dict[str, tuple[float, float]]
    step_seconds: float | None
    forgotten: float | None
    kept: str | None
    differences: dict[str, Difference]


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Plain values, with null for what a diverged run left without a number."""
    values = [finite(asdict(result)) for result in results]
    for one in values:
        one["chosen"]["losses"] = [[rate, loss] for rate, loss in one["chosen"]["losses"].items()]
    return values


def final_runs(comparison: Comparison) -> dict[str, dict[int, FinalRun]]:
    """The finished final runs by entry and seed."""
    found: dict[str, dict[int, FinalRun]] = {}
    for name, chosen in comparison.chosen.items():
        for seed in comparison.plan.seeds:
            job = Job("final", name, chosen.learning_rate, seed)
            if (metrics := comparison.stored(job)) is not None:
                folder = RunFolder(comparison.study.folder / job.name)
                found.setdefault(name, {})[seed] = FinalRun(folder, metrics, read_rows(folder.rows))
    if not found:
        raise DataError(f"{comparison.study.folder}: no final run is finished yet; run smoa compare on it first")
    return {name: found[name] for name in comparison.study.entries if name in found}


def results_of(comparison: Comparison, finals: Mapping[str, Mapping[int, FinalRun]]) -> list[Result]:
    """The results of all entries with a final run, by budget and by what decides, best first."""
    entries = comparison.study.entries
    budgets: dict[str, list[str]] = {}
    for name in finals:
        budgets.setdefault(entries[name].budget, []).append(name)
    machines = Counter(_machine(run) for of_entry in finals.values() for run in of_entry.values()).most_common(1)
    return [
        result
        for names in budgets.values()
        for result in _of_budget(comparison, {name: finals[name] for name in names}, machines[0][0])
    ]


def _of_budget(
    comparison: Comparison, finals: Mapping[str, Mapping[int, FinalRun]], machine: tuple[Any, ...]
) -> list[Result]:
    runs = [run for of_entry in finals.values() for run in of_entry.values()]
    some = runs[0].rows  # all have the same, in any order: they are of the plan's data and encoder
    keys = list(some)
    measures = [  # one that is the same everywhere compares nothing, and would cost the others in Holm's correction
        each
        for each in measures_of(some[keys[0]])
        if {None} <= (found := {run.rows[key][each.field] for run in runs for key in keys}) or len(found) > 1
    ]
    tokens = np.array([some[key]["tokens"] for key in keys], dtype=np.float64)
    weights = {each.title: tokens if each.per_token else np.ones(len(keys)) for each in measures}

    def values(name: str, measure: Measure, seeds: Sequence[int]) -> Floats:
        """Per seed and row."""
        rows = [[finals[name][seed].rows[key][measure.field] for key in keys] for seed in seeds]
        return np.array([[np.inf if value is None else value for value in of_seed] for of_seed in rows], np.float64)

    of_seeds = {
        each.title: {
            name: values(name, each, list(of_entry)).sum(axis=1) / weights[each.title].sum()
            for name, of_entry in finals.items()
        }
        for each in measures
    }
    known = {title: variances_of(own) for title, own in of_seeds.items()}
    results = []
    for name, of_entry in finals.items():
        reference, seeds = comparison.study.reference(name), list(of_entry)
        paired = [seed for seed in seeds if name != reference and seed in finals.get(reference, {})]
        differences = {
            each.title: paired_difference(
                values(name, each, paired),
                values(reference, each, paired),
                weights[each.title],
                each.sign,
                seed_error(known[each.title], (name, reference), len(paired)),
            )
            for each in measures
            if paired
        }
        result = Result(
            entry=name,
            method=comparison.study.entries[name].method,
            budget=comparison.study.entries[name].budget,
            reference=reference,
            parameters=comparison.plan.entries[name].parameters,
            share=comparison.plan.entries[name].parameters / max(1, comparison.plan.entries[reference].parameters),
            chosen=comparison.chosen[name],
            seeds=seeds,
            paired=paired,
            diverged=sum(measured(run.metrics) is None for run in of_entry.values()),
            rows=len(keys),
            values={title: (float(own[name].mean()), _spread(own[name])) for title, own in of_seeds.items()},
            step_seconds=_step_seconds([run for run in of_entry.values() if _machine(run) == machine]),
            forgotten=_forgotten(list(of_entry.values())),
            kept=_kept(of_entry),
            differences=differences,
        )
        results.append(result)
    sign = -measures[0].sign if measures else 1
    return sorted(_judged(results), key=lambda one: sign * next(iter(one.values.values()), (0.0, 0.0))[0])


def _judged(results: Sequence[Result]) -> list[Result]:
    """The results with Holm's correction for all comparisons of a budget by what decides, and one for those by all
    other measures. An entry whose best rate lies at the edge of its search is never called worse."""
    families: tuple[dict[tuple[str, str], Difference], ...] = ({}, {})
    for result in results:
        for place, (title, each) in enumerate(result.differences.items()):
            families[place > 0][result.entry, title] = each
    judged: dict[tuple[str, str], Difference] = {}
    for family in families:
        judged |= zip(family, corrected([*family.values()]), strict=True)
    at_edge = {result.entry for result in results if result.chosen.place == "edge"}
    for (entry, title), each in judged.items():
        reference = next(result.reference for result in results if result.entry == entry)
        if (each.final == "worse" and entry in at_edge) or (each.final == "better" and reference in at_edge):
            judged[entry, title] = replace(each, verdict="open", holm_verdict=None)
    return [
        replace(result, differences={title: judged[result.entry, title] for title in result.differences})
        for result in results
    ]


def _machine(run: FinalRun) -> tuple[Any, ...]:
    made = run.metrics.get("provenance", {})
    return made.get("device"), made.get("threads")


def _step_seconds(runs: Sequence[FinalRun]) -> float | None:
    """Of runs that were not interrupted, since a resumed one knows only the time of its last steps."""
    timed = [run.metrics["training"] for run in runs if not run.metrics["training"]["resumed"]]
    return fmean(one["seconds"] / max(1, one["steps"]) for one in timed) if timed else None


def _forgotten(runs: Sequence[FinalRun]) -> float | None:
    """The mean change of the loss on general text; None where it wasn't measured or is no number."""
    changes = [(run.metrics["forgetting"] or {}).get("change") for run in runs]
    known: list[float] = [change for change in changes if change is not None]
    return fmean(known) if len(known) == len(runs) else None


def _kept(runs: Mapping[int, FinalRun]) -> str | None:
    """The folder of the best of the runs whose adapters are kept."""
    kept = {seed: measured(run.metrics) for seed, run in runs.items() if run.folder.adapter.is_dir()}
    return str(runs[best_of(kept)].folder.path) if kept else None


def _spread(values: Floats) -> float:
    """The standard deviation over seeds; 0 for one seed, NaN where one diverged."""
    if not np.isfinite(values).all():
        return float("nan")
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
