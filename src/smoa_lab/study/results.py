"""The results of a study's entries, from the folders of its final runs: values, bounds, and which one to take."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from smoa_lab.basics.plain import finite
from smoa_lab.data.answers import OWN, RULES, Metric
from smoa_lab.data.own_metric import own_metric
from smoa_lab.scoring.bounds import Family, Floats
from smoa_lab.study.plan import Metrics, Plan, Timing
from smoa_lab.study.search import Chosen, best_of
from smoa_lab.study.study import Study, read_stored
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

    @property
    def is_share(self) -> bool:
        """Whether it counts right answers."""
        return self.scale == 100


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


def read_metrics(folder: RunFolder) -> Metrics:
    """The metrics of a finished run."""
    metrics: Metrics = read_stored(folder.metrics)
    return metrics


def measured(metrics: Metrics) -> float | None:
    """What a search goes by: the loss, for preferences DPO's; None for a run that diverged."""
    scores = metrics["evaluation"].get("after") or metrics["evaluation"]["before"]
    loss: float | None = scores.get("dpo_loss", scores["loss"])
    return loss


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
    answers = ("right_{}",) if metric == "choice" else ("answer_{}",)
    stages = [(row, stage) for row in rows if metric for stage in ("before", "after") if stage in row]
    parts = [(row, stage) for row, stage in stages if any(key.format(stage) in row for key in answers)]
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


NEAR, EQUAL = 0.1, 0.02
"""Shares of a step's time, and of parameters, that make no difference in cost."""


@dataclass(frozen=True)
class Result:
    """One entry: what it trained and reached over its seeds.

    ``values`` are mean and standard deviation over seeds by measure, ``worst`` by how much it is at most worse than the
    best of the others; ``share`` is its number of parameters as a part of those of the entry that it is shown against;
    ``rows`` and ``groups`` count the held-out ones; ``memory`` and ``size`` are bytes, of a run at its peak and of the
    adapter; ``forgotten`` is how the loss on general text changed. None is what wasn't measured or is no number.
    """

    entry: str
    method: str
    budget: str
    parameters: int
    share: float
    chosen: Chosen
    seeds: list[int]
    diverged: int
    rows: int
    groups: int
    values: dict[str, tuple[float, float]]
    worst: dict[str, float]
    step_seconds: float
    memory: int | None
    size: int | None
    forgotten: float | None
    kept: str | None

    def as_json(self) -> Any:
        """Plain values, with null for what a diverged run left without a number."""
        return finite(asdict(self) | {"chosen": asdict(self.chosen) | {"losses": list(self.chosen.losses.items())}})


@dataclass(frozen=True)
class Decision:
    """What a look says for good: the ``entry`` to take, or none of them, since training ``hurt`` or gained nothing that
    could be shown."""

    entry: str | None
    hurt: bool = False


@dataclass(frozen=True)
class Budget:
    """The entries of a budget, best first, after ``round`` whole rounds of the ``planned`` ones, 0 before the second
    one is in. ``families`` have the bounds in each measure, first in the one that decides; ``order`` is that of cost.
    ``done`` final runs of ``wanted`` are in. Nobody is taken over those ``at_edge``, which may do better beyond."""

    results: list[Result]
    families: dict[str, Family]
    measure: Measure | None
    order: list[str]
    at_edge: list[str]
    round: int
    planned: int
    done: int
    wanted: int
    level: float
    tolerance: float
    is_last: bool

    @property
    def family(self) -> Family | None:
        """That of what decides, once there are bounds."""
        return self.families[self.measure.title] if self.measure and self.round > 1 else None

    def decision(self) -> Decision | None:
        """None where it is open; after the last round that nothing was gained."""
        family = self.family
        if family is None or family.untouched is None:
            return None
        if family.hurt():
            return Decision(None, hurt=True)
        for name in self.order:
            if not set(self.at_edge) - {name} and family.suffices(name, self.tolerance):
                return Decision(name)
        gained = any(family.upper(name, None) < 0 for name in family.names)
        return Decision(None) if self.is_last and not gained else None

    @property
    def against(self) -> str:
        """The entry to which all are shown: the one to take, or the first in order of cost."""
        decided = self.decision()
        return (decided and decided.entry) or self.order[0]

    def as_json(self) -> Any:
        """What decides, in plain values."""
        family, decided = self.family, self.decision()
        pairs = [
            [one, other, family.mean(one) - family.mean(other), family.upper(one, other)]
            for one in (family.names if family else ())
            for other in (family.names if family else ())
            if one != other and family
        ]
        gains = {n: [-family.upper(n, None), -family.lower(n, None)] for n in family.names} if family else {}
        return finite(
            {
                "measure": self.measure and self.measure.title,
                "round": self.round,
                "level": self.level,
                "take": decided and decided.entry,
                "pairs": pairs,
                "gains": gains,
            }
        )


def budgets_of(
    study: Study,
    plan: Plan,
    chosen: Mapping[str, Chosen],
    finals: Mapping[str, Mapping[int, FinalRun]],
    metric: Metric | None,
    scorer: str | None,
    most: int | None = None,
) -> dict[str, Budget]:
    """All entries with a final run, by budget, after at most so many rounds: by default those of the budget's answer,
    or all that are whole."""
    budgets: dict[str, dict[str, Mapping[int, FinalRun]]] = {}
    for name, of_entry in finals.items():
        budgets.setdefault(study.entries[name].budget, {})[name] = of_entry
    run = RunFolder(study.folder / "untouched")
    as_it_is = read_rows(run, metric, scorer) if run.finished else {}
    return {name: _of_budget(study, plan, chosen, name, own, metric, as_it_is, most) for name, own in budgets.items()}


def _of_budget(
    study: Study,
    plan: Plan,
    chosen: Mapping[str, Chosen],
    budget: str,
    finals: Mapping[str, Mapping[int, FinalRun]],
    metric: Metric | None,
    as_it_is: Mapping[RowKey, Mapping[str, Any]],
    most: int | None,
) -> Budget:
    of_budget = [name for name, entry in study.entries.items() if entry.budget == budget]
    alive = [name for name in of_budget if name not in plan.failed]
    whole = [all(seed in finals.get(name, {}) for name in alive) for seed in plan.seeds]
    rounds = whole.index(False) if False in whole else len(whole)
    take = plan.takes.get(budget)
    number = min(rounds, most or (take.round if take else rounds))
    if not take and most is None:  # between looks there is none
        number = max((each for each in plan.looked_at() if each <= number), default=0 if plan.extensions else number)
    seeds = plan.seeds[:number] if number > 1 else plan.seeds
    finals = {name: {seed: run for seed, run in own.items() if seed in seeds} for name, own in finals.items()}
    finals = {name: own for name, own in finals.items() if own and (number < 2 or name in alive)}
    runs = [run for own in finals.values() for run in own.values()]
    keys = [*runs[0].rows]  # all have the same, in any order: they are of the plan's data and encoder
    of_group = np.array([runs[0].rows[key].get("group") or key[0] for key in keys])
    keys = [keys[place] for place in np.argsort(of_group, kind="stable")]
    of_group.sort()
    starts = np.flatnonzero(np.concatenate([[True], of_group[1:] != of_group[:-1]]))
    measures = [  # one that is the same everywhere compares nothing; what was asked for stays
        each
        for each in measures_of(runs[0].rows[keys[0]], metric)
        if each.field == SCORED
        or {None} <= (found := {run.rows[key][each.field] for run in runs for key in keys})
        or len(found) > 1
    ]

    def summed(rows: Sequence[Mapping[RowKey, Mapping[str, Any]]], field: str) -> Floats:
        """(runs, groups), infinite where a run diverged."""
        of_runs = [[of_run[key][field] for key in keys] for of_run in rows]
        values = np.array([[np.inf if value is None else value for value in own] for own in of_runs], np.float64)
        return np.asarray(np.add.reduceat(values, starts, axis=1))

    weights = {True: summed([runs[0].rows], "tokens")[0], False: np.diff([*starts, len(keys)]).astype(float)}
    entries = len(of_budget) + list(plan.dropped.values()).count(budget)
    level, families, places = plan.level(entries), dict[str, Family](), [*finals]
    for each in measures:
        width = min(len(own) for own in finals.values())
        stacked = [
            -each.sign * summed([run.rows for run in own.values()], each.field)[:width] for own in finals.values()
        ]
        values = np.array([np.where(np.isnan(own) | np.isinf(own), np.inf, own) for own in stacked])
        own_weights, untouched = weights[each.per_token], None
        if isinstance(each.untouched, float):
            untouched = -each.sign * each.untouched * own_weights[None]
        elif as_it_is:
            untouched = -each.sign * summed([as_it_is], each.untouched)
            untouched = untouched if np.isfinite(untouched).all() else None
        families[each.title] = Family(places, values, untouched, own_weights, each.is_share, level, entries)
    decides = measures[0] if measures else None
    order = by_cost({name: plan.entries[name] for name in places})
    looked = plan.looked_at()
    made = Budget(
        results=[],
        families=families,
        measure=decides,
        order=order,
        at_edge=[name for name in places if chosen[name].place in ("edge", "cut")],
        round=number,
        planned=plan.rounds,
        done=sum(len(own) for own in finals.values()),
        wanted=len(plan.seeds) * len(alive),
        level=level,
        tolerance=study.tolerance,
        is_last=bool(looked) and number >= looked[-1],
    )
    shown = plan.entries[made.against].parameters
    results = [_result(study, plan, chosen[name], name, own, made, shown, metric) for name, own in finals.items()]
    first = families[decides.title] if decides else None
    results.sort(key=lambda one: first.mean(one.entry) if first else 0.0)
    return replace(made, results=results)


def _result(
    study: Study,
    plan: Plan,
    chosen: Chosen,
    name: str,
    runs: Mapping[int, FinalRun],
    budget: Budget,
    shown: int,
    metric: Metric | None,
) -> Result:
    kept = {seed: kept_by(run, metric) for seed, run in runs.items() if run.folder.adapter.is_dir()}
    forgot: list[Any] = [(run.metrics["forgetting"] or {}).get("change") for run in runs.values()]
    first = next(iter(runs.values()))
    memories = [run.metrics["training"].get("peak_memory_bytes") for run in runs.values()]
    families = budget.families
    return Result(
        entry=name,
        method=study.entries[name].method,
        budget=study.entries[name].budget,
        parameters=plan.entries[name].parameters,
        share=plan.entries[name].parameters / max(1, shown),
        chosen=chosen,
        seeds=list(runs),
        diverged=sum(measured(run.metrics) is None for run in runs.values()),
        rows=sum(not copy for _, copy in first.rows),
        groups=len(next(iter(families.values())).weights) if families else len(first.rows),
        values={
            title: (-MEASURES[title].sign * family.mean(name), family.spread(name))
            for title, family in families.items()
        },
        worst={
            title: family.worst(name)
            for title, family in families.items()
            if budget.round > 1 and len(budget.order) > 1
        },
        step_seconds=plan.entries[name].step,
        memory=max((each for each in memories if each), default=None),
        size=first.metrics["parameters"].get("adapter_bytes"),
        forgotten=None if None in forgot else fmean(forgot),
        kept=str(runs[best_of(kept)].folder.path) if kept else None,
    )


def kept_by(run: FinalRun, metric: Metric | None) -> float | None:
    """What says which of an entry's adapters is kept: the mean of what decides, lower is better; None if it
    diverged."""
    measure = measures_of(next(iter(run.rows.values())), metric)[0]
    if measure.per_token or measured(run.metrics) is None:
        return measured(run.metrics)
    return fmean(-measure.sign * row[measure.field] for row in run.rows.values())


def by_cost(entries: Mapping[str, Timing]) -> list[str]:
    """The entries' names in order of cost: of those within a tenth of the quickest step that are left, the one with the
    fewest parameters comes next, the file's first of those within 2 %. Steps that were timed on several machines
    can't be compared, and parameters decide."""
    left, order = dict(entries), list[str]()
    is_one = len({one.machine for one in entries.values()}) == 1
    while left:
        quickest = min(one.step for one in left.values())
        near = {n: one.parameters for n, one in left.items() if not is_one or one.step <= (1 + NEAR) * quickest}
        order.append(next(n for n, number in near.items() if number <= (1 + EQUAL) * min(near.values())))
        del left[order[-1]]
    return order
