"""The results of a study's entries, from the folders of its final runs, with differences between entries."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from statistics import fmean
from typing import Any

import numpy as np

from smoa_lab.basics.plain import finite
from smoa_lab.data.answers import OWN, RULES, Metric
from smoa_lab.data.own_metric import own_metric
from smoa_lab.scoring import differences as rule
from smoa_lab.scoring.differences import Difference, Floats
from smoa_lab.study.comparison import Comparison, measured
from smoa_lab.study.plan import Metrics
from smoa_lab.study.search import Chosen, best_of
from smoa_lab.training.run_folder import RunFolder

RowKey = tuple[str, int]
"""A row's digest, and its number among equal ones."""


@dataclass(frozen=True)
class Measure:
    """What is compared: a ``field`` of each held-out row, per token or per row; ``sign`` is 1 where higher is better.
    It is shown ``scale`` times as large, in ``unit`` with so many digits. ``untouched`` is the field of a row that the
    untouched model has, or its value for all rows."""

    title: str
    field: str
    per_token: bool
    sign: int
    scale: float
    digits: int
    unit: str
    untouched: str | float


LOSS = Measure("loss", "after", True, -1, 1, 4, "nats per token", "before")
OF_CHOICES = Measure("accuracy %", "right_after", False, 1, 100, 1, "points", "right_before")
OF_PREFERENCES = (
    Measure("DPO loss", "dpo_loss", False, -1, 1, 4, "nats", math.log(2)),
    Measure("margin", "margin", False, 1, 1, 3, "nats", 0.0),
    Measure("won %", "won", False, 1, 100, 1, "points", 0.0),
)
SCORED = "scored_after"
OF_METRICS = {
    name: Measure(f"{title} %", SCORED, False, 1, 100, 1, "points", "scored_before")
    for name, title in {"choice": "accuracy", **{name: name for name in RULES}}.items()
} | {OWN: Measure(OWN, SCORED, False, 1, 1, 3, "points of score", "scored_before")}
MEASURES = {each.title: each for each in (LOSS, OF_CHOICES, *OF_PREFERENCES, *OF_METRICS.values())}
"""All measures by their titles."""


def measures_of(row: Mapping[str, Any], metric: Metric | None) -> Sequence[Measure]:
    """What is compared on rows like this one, first what decides."""
    if metric is not None:
        return OF_METRICS[metric], LOSS
    if "dpo_loss" in row:
        return OF_PREFERENCES
    return (LOSS, OF_CHOICES) if "right_after" in row else (LOSS,)


@dataclass(frozen=True)
class FinalRun:
    """A finished run and its held-out rows."""

    folder: RunFolder
    metrics: Metrics
    rows: dict[RowKey, dict[str, Any]]


def read_rows(run: RunFolder, metric: Metric | None = None, by: str | None = None) -> dict[RowKey, dict[str, Any]]:
    """The held-out rows of a run, with what the ``metric`` makes of stored answers, the worst where it diverged. What
    the user's own makes of them, whose name is ``by``, is stored: a report needs no function."""
    with gzip.open(run.rows, "rt", encoding="utf-8") as lines:
        rows = list(map(json.loads, lines))
    parts = [(row, stage) for row in rows if metric for stage in ("before", "after") if stage in row]
    if metric == OWN and not all(f"scored_{stage}" in row and row["scored_by"] == by for row, stage in parts):
        own = own_metric(by)
        for row, stage in parts:
            row[f"scored_{stage}"] = own.score(row[f"answer_{stage}"], row["own"], row["where"])
        run.write_rows({**row, "scored_by": own.name} for row in rows)
    for row, stage in parts:
        value = row.get(f"right_{stage}" if metric == "choice" else f"scored_{stage}")
        if metric in RULES:
            value = float(RULES[metric](row[f"answer_{stage}"], row["reference"]))
        row[f"scored_{stage}"] = -math.inf if row[stage] is None else value
    return {(row["digest"], row["copy"]): row for row in rows}


@dataclass(frozen=True)
class Result:
    """One entry: what it trained and reached over its seeds, and the differences to the reference of its budget.

    ``values`` are mean and standard deviation over seeds by measure; ``share`` is its number of parameters as a part of
    the reference's; ``rows`` counts the held-out ones; ``forgotten`` is how the loss on general text changed, None
    where it wasn't measured or is no number.
    """

    entry: str
    method: str
    budget: str
    reference: str
    parameters: int
    share: float
    chosen: Chosen
    seeds: list[int]
    diverged: int
    rows: int
    values: dict[str, tuple[float, float]]
    step_seconds: float
    forgotten: float | None
    kept: str | None
    differences: dict[str, Difference]

    def as_json(self) -> Any:
        """Plain values, with null for what a diverged run left without a number."""
        return finite(asdict(self) | {"chosen": asdict(self.chosen) | {"losses": list(self.chosen.losses.items())}})


@dataclass(frozen=True)
class Budget:
    """The entries of a budget, best first, and what decides between them.

    ``pairs`` say by how much the first of two is worse than the second, ``gain`` by how much the best is better than
    the untouched model: with intervals that all together miss in a share ``level``. They are there once all ``planned``
    final runs are in, of two seeds or more.
    """

    results: list[Result]
    planned: int
    measure: Measure | None
    pairs: dict[tuple[str, str], Difference]
    gain: Difference | None
    level: float
    tolerance: float

    @property
    def is_whole(self) -> bool:
        return sum(len(one.seeds) for one in self.results) >= self.planned

    def as_json(self) -> Any:
        """What decides, in plain values."""
        pairs = [[*pair, loss.mean, loss.low, loss.high] for pair, loss in self.pairs.items()]
        gain = self.gain and [self.gain.mean, self.gain.low, self.gain.high]
        decides = self.measure and self.measure.title
        return finite({"measure": decides, "level": self.level, "gain": gain, "pairs": pairs})


def final_runs(comparison: Comparison) -> dict[str, dict[int, FinalRun]]:
    """The finished final runs by entry and seed."""
    found: dict[str, dict[int, FinalRun]] = {}
    for name in comparison.chosen:
        for seed in comparison.seeds:
            job = comparison.final(name, seed)
            if (metrics := comparison.stored(job)) is not None:
                folder = RunFolder(comparison.study.folder / job.name)
                rows = read_rows(folder, comparison.metric, comparison.scorer)
                found.setdefault(name, {})[seed] = FinalRun(folder, metrics, rows)
    return {name: found[name] for name in comparison.study.entries if name in found}


def budgets_of(comparison: Comparison, finals: Mapping[str, Mapping[int, FinalRun]]) -> dict[str, Budget]:
    """All entries with a final run, by budget."""
    budgets: dict[str, dict[str, Mapping[int, FinalRun]]] = {}
    for name, of_entry in finals.items():
        budgets.setdefault(comparison.study.entries[name].budget, {})[name] = of_entry
    machines = Counter(_machine(run) for of_entry in finals.values() for run in of_entry.values()).most_common(1)
    return {budget: _of_budget(comparison, budget, own, machines[0][0]) for budget, own in budgets.items()}


def _of_budget(
    comparison: Comparison, budget: str, finals: Mapping[str, Mapping[int, FinalRun]], machine: tuple[Any, ...]
) -> Budget:
    study, plan, seeds = comparison.study, comparison.plan, comparison.seeds
    runs = [run for of_entry in finals.values() for run in of_entry.values()]
    some = runs[0].rows  # all have the same, in any order: they are of the plan's data and encoder
    copies = Counter(digest for digest, _ in some)
    keys = [(digest, copy) for digest, number in copies.items() for copy in range(number)]
    measures = [  # one that is the same everywhere compares nothing, and costs the others; what was asked for stays
        each
        for each in measures_of(some[keys[0]], comparison.metric)
        if each.field == SCORED
        or {None} <= (found := {run.rows[key][each.field] for run in runs for key in keys})
        or len(found) > 1
    ]
    tokens, rows = _values([some], keys, "tokens")[0], np.array([*copies.values()], np.float64)
    weights = {each.title: tokens if each.per_token else rows for each in measures}
    values = {
        each.title: {
            name: _values([run.rows for run in own.values()], keys, each.field) for name, own in finals.items()
        }
        for each in measures
    }
    of_seeds = {
        title: {name: own.sum(axis=1) / weights[title].sum() for name, own in of_entries.items()}
        for title, of_entries in values.items()
    }
    known = {title: rule.variances_of(own) for title, own in of_seeds.items()}
    planned = len(seeds) * sum(entry.budget == budget for entry in study.entries.values())
    is_whole = len(runs) == planned  # else what is found could decide what is run
    level = rule.SIGNIFICANT / 2 ** (comparison.look(budget, [*finals]) if is_whole and len(seeds) > 1 else 0)

    def difference(measure: Measure, of: str, other: str, level: float) -> Difference:
        own, title = values[measure.title], measure.title
        error = rule.seed_error(known[title], (of, other), len(seeds))
        return rule.paired_difference(own[of], own[other], weights[title], measure.sign, error, level)

    results = []
    for name, of_entry in finals.items():
        reference = study.reference(name)
        kept = {seed: measured(run.metrics) for seed, run in of_entry.items() if run.folder.adapter.is_dir()}
        trained = [run.metrics["training"] for run in of_entry.values() if _machine(run) == machine]
        # a resumed run knows only the time of its last steps; other work only slows a step
        timed = [one["seconds"] / max(1, one["steps"]) for one in trained if not one["resumed"]]
        forgot: list[Any] = [(run.metrics["forgetting"] or {}).get("change") for run in of_entry.values()]
        compares = is_whole and reference in finals and name != reference
        result = Result(
            entry=name,
            method=study.entries[name].method,
            budget=budget,
            reference=reference,
            parameters=plan.entries[name].parameters,
            share=plan.entries[name].parameters / max(1, plan.entries[reference].parameters),
            chosen=comparison.chosen[name],
            seeds=list(of_entry),
            diverged=sum(measured(run.metrics) is None for run in of_entry.values()),
            rows=len(copies),
            values={
                title: (float(own[name].mean()), known[title].get(name, (0.0, 0))[0] ** 0.5)
                for title, own in of_seeds.items()
            },
            step_seconds=min(plan.entries[name].step, *timed),
            forgotten=None if None in forgot else fmean(forgot),
            kept=str(of_entry[best_of(kept)].folder.path) if kept else None,
            differences={each.title: difference(each, name, reference, level) for each in measures if compares},
        )
        results.append(result)
    decides = measures[0] if measures else None
    sign = decides.sign if decides else 1
    results = sorted(_judged(results, level), key=lambda one: -sign * next(iter(one.values.values()), (0.0, 0.0))[0])
    pairs, gain = dict[tuple[str, str], Difference](), None
    if decides and is_whole and len(seeds) > 1:
        own, best = values[decides.title], results[0].entry
        alive = {name: bool(np.isfinite(each).all()) for name, each in own.items()}
        for one, other in permutations(finals, 2):
            lost = -math.inf if alive[one] else math.inf
            if alive[one] and alive[other]:
                worse, better = (one, other)[::-sign]
                pairs[one, other] = difference(decides, worse, better, level / (len(finals) - 1))
            else:
                pairs[one, other] = Difference(lost, lost, lost, "same")
        before = _untouched(comparison, keys, decides, weights[decides.title])
        if before is not None and alive[best]:
            error = rule.seed_error(known[decides.title], (best,), len(seeds))
            more, less = (before + 0 * own[best], own[best])[::-sign]
            gain = rule.paired_difference(more, less, weights[decides.title], 1, error, level)
    return Budget(results, planned, decides, pairs, gain, level, study.tolerance)


def _values(runs: Sequence[Mapping[RowKey, Mapping[str, Any]]], keys: Sequence[RowKey], field: str) -> Floats:
    """(runs, rows), infinite where a run diverged; equal rows are one, their sum: a copy says nothing new."""
    rows, firsts = [[rows[key][field] for key in keys] for rows in runs], [not copy for _, copy in keys]
    values = np.array([[np.inf if value is None else value for value in of_run] for of_run in rows], np.float64)
    return np.add.reduceat(values, np.flatnonzero(firsts), axis=1)


def _untouched(comparison: Comparison, keys: Sequence[RowKey], measure: Measure, weights: Floats) -> Floats | None:
    """The values of the untouched model, (1, rows); None where it was not scored."""
    if isinstance(measure.untouched, float):
        return measure.untouched * weights[None]
    run = RunFolder(comparison.study.folder / "untouched")
    rows = read_rows(run, comparison.metric, comparison.scorer) if run.finished else {}
    return _values([rows], keys, measure.untouched) if rows else None


def _judged(results: Sequence[Result], level: float) -> list[Result]:
    """The results with Holm's correction for all comparisons of a budget by what decides, and one for those by all
    other measures. An entry whose best rate lies at the edge of its search is never called worse."""
    places = [(one.entry, number, title) for one in results for number, title in enumerate(one.differences)]
    known = {one.entry: one for one in results}
    at_edge = {one.entry for one in results if one.chosen.place == "edge"}
    judged: dict[str, dict[str, Difference]] = {one.entry: {} for one in results}
    for decides in (True, False):
        family = [(entry, title) for entry, number, title in places if (number == 0) == decides]
        found = rule.corrected([known[entry].differences[title] for entry, title in family], level)
        for (entry, title), each in zip(family, found, strict=True):
            worse = {"worse": entry, "better": known[entry].reference}.get(each.final)
            judged[entry][title] = replace(each, verdict="open", holm_verdict=None) if worse in at_edge else each
    return [replace(one, differences=judged[one.entry]) for one in results]


def _machine(run: FinalRun) -> tuple[Any, ...]:
    made = run.metrics.get("provenance", {})
    return made.get("device"), made.get("threads")
