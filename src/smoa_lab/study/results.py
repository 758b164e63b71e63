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
from numpy.typing import NDArray

from smoa_lab.basics.plain import finite
from smoa_lab.data.answers import OWN, RULES, Metric
from smoa_lab.data.own_metric import own_metric
from smoa_lab.scoring.bounds import Family, Floats
from smoa_lab.study.plan import Metrics, Plan, Timing
from smoa_lab.study.search import Chosen, best_of
from smoa_lab.study.study import ALL_SIZES, Study, read_stored
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
    """The entries of a budget, or of all sizes, best first, after ``round`` whole rounds of the ``planned`` ones, 0
    before the second one is in. ``families`` have the bounds in each measure, first in the one that decides; ``order``
    is that of cost, of all sizes that of parameters.
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
    of_sizes: bool = False

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


@dataclass(frozen=True)
class Found:
    """What a study has found: ``finals`` by entry and seed, and the ``untouched`` model's rows."""

    study: Study
    plan: Plan
    chosen: Mapping[str, Chosen]
    finals: Mapping[str, Mapping[int, FinalRun]]
    metric: Metric | None
    untouched: Mapping[RowKey, Mapping[str, Any]]

    def budgets(self, most: int | None = None) -> dict[str, Budget]:
        """Each family that has a final run, after at most so many rounds: by default those of its answer, or all that
        are whole."""
        families = self.study.families()
        return {name: self._budget(name, most) for name, own in families.items() if self.finals.keys() & {*own}}

    def _budget(self, name: str, most: int | None) -> Budget:
        listed = self.study.families()[name]
        alive = [entry for entry in listed if entry not in self.plan.failed]
        number = self._round(name, alive, most)
        finals = self._of_rounds(listed if number < 2 else alive, number)
        held_out = HeldOut.of([run for own in finals.values() for run in own.values()], self.metric)
        dropped = self._dropped(name)
        level = self.plan.level(len(listed) + dropped)
        sizes = [self.study.entries[entry].size or 0 for entry in finals]
        families = {
            each.title: Family(
                names=[*finals],
                values=held_out.values(each, finals),
                untouched=held_out.untouched(each, self.untouched),
                weights=held_out.weights(each),
                is_share=each.is_share,
                level=level,
                entries=len(listed) + dropped,
                pools=sizes,
            )
            for each in held_out.measures
        }
        timings, looked = {entry: self.plan.entries[entry] for entry in finals}, self.plan.looked_at()
        made = Budget(
            results=[],
            families=families,
            measure=held_out.measures[0] if held_out.measures else None,
            order=by_size(timings) if name == ALL_SIZES else by_cost(timings),
            at_edge=[entry for entry in finals if self.chosen[entry].is_at_edge],
            round=number,
            planned=self.plan.rounds,
            done=sum(len(own) for own in finals.values()),
            wanted=len(self.plan.seeds) * len(alive),
            level=level,
            tolerance=self.study.tolerance,
            is_last=bool(looked) and number >= looked[-1],
            of_sizes=name == ALL_SIZES,
        )
        shown = self.plan.entries[made.against].parameters
        results = [self._result(entry, own, made, shown) for entry, own in finals.items()]
        if made.measure is not None:
            results.sort(key=lambda one: families[held_out.measures[0].title].mean(one.entry))
        return replace(made, results=results)

    def _round(self, name: str, alive: Sequence[str], most: int | None) -> int:
        """How many whole rounds of a family are shown; between two looks those of the last one."""
        whole = [all(seed in self.finals.get(entry, {}) for entry in alive) for seed in self.plan.seeds]
        rounds, take = whole.index(False) if False in whole else len(whole), self.plan.takes.get(name)
        if most or take:
            return min(rounds, most or (take.round if take else rounds))
        looks = [each for each in self.plan.looked_at() if each <= rounds]
        return max(looks, default=0 if self.plan.extensions else rounds)

    def _of_rounds(self, names: Sequence[str], number: int) -> dict[str, dict[int, FinalRun]]:
        """The final runs of so many rounds, all that there are before the second."""
        seeds = self.plan.seeds[:number] if number > 1 else self.plan.seeds
        finals = {name: self.finals[name] for name in names if name in self.finals}
        found = {name: {seed: run for seed, run in own.items() if seed in seeds} for name, own in finals.items()}
        return {name: own for name, own in found.items() if own}

    def _dropped(self, name: str) -> int:
        """How many entries were dropped from a family."""
        listed = {self.study.entries[entry].budget for entry in self.study.families()[name]}
        return sum(budget in listed for budget in self.plan.dropped.values())

    def _result(self, name: str, runs: Mapping[int, FinalRun], budget: Budget, shown: int) -> Result:
        kept = {seed: kept_by(run, self.metric) for seed, run in runs.items() if run.folder.adapter.is_dir()}
        forgot: list[Any] = [(run.metrics["forgetting"] or {}).get("change") for run in runs.values()]
        first = next(iter(runs.values()))
        memories = [run.metrics["training"].get("peak_memory_bytes") for run in runs.values()]
        families, timing = budget.families, self.plan.entries[name]
        return Result(
            entry=name,
            method=self.study.entries[name].method,
            budget=self.study.entries[name].budget,
            parameters=timing.parameters,
            share=timing.parameters / max(1, shown),
            chosen=self.chosen[name],
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
            step_seconds=timing.step,
            memory=max((each for each in memories if each), default=None),
            size=first.metrics["parameters"].get("adapter_bytes"),
            forgotten=None if None in forgot else fmean(forgot),
            kept=str(runs[best_of(kept)].folder.path) if kept else None,
        )


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of runs, which all have the same: their ``keys``, group by group, and where each group
    ``starts``; and what is compared on them."""

    keys: Sequence[RowKey]
    starts: NDArray[np.intp]
    tokens: Floats
    measures: Sequence[Measure]

    @classmethod
    def of(cls, runs: Sequence[FinalRun], metric: Metric | None) -> HeldOut:
        """A measure that is the same everywhere compares nothing; what the metric makes stays."""
        rows = runs[0].rows
        keys = sorted(rows, key=lambda key: rows[key].get("group") or key[0])
        of_group = np.array([rows[key].get("group") or key[0] for key in keys])
        starts = np.flatnonzero(np.concatenate([[True], of_group[1:] != of_group[:-1]]))
        measures = [
            each
            for each in measures_of(rows[keys[0]], metric)
            if each.field == SCORED
            or {None} <= (found := {run.rows[key][each.field] for run in runs for key in keys})
            or len(found) > 1
        ]
        made = cls(keys, starts, np.empty(0), measures)
        return replace(made, tokens=made._sums([rows], "tokens")[0])

    def _sums(self, runs: Sequence[Mapping[RowKey, Mapping[str, Any]]], field: str) -> Floats:
        """(runs, groups), infinite where a run diverged."""
        of_runs = [[rows[key][field] for key in self.keys] for rows in runs]
        values = np.array([[np.inf if value is None else value for value in own] for own in of_runs], np.float64)
        return np.asarray(np.add.reduceat(values, self.starts, axis=1))

    def weights(self, measure: Measure) -> Floats:
        return self.tokens if measure.per_token else np.diff([*self.starts, len(self.keys)]).astype(float)

    def values(self, measure: Measure, finals: Mapping[str, Mapping[int, FinalRun]]) -> Floats:
        """(entries, seeds, groups), lower is better, as many seeds as each entry has."""
        width = min(len(own) for own in finals.values())
        sums = [self._sums([run.rows for run in own.values()], measure.field)[:width] for own in finals.values()]
        values = -measure.sign * np.array(sums)
        return np.where(np.isfinite(values), values, np.inf)

    def untouched(self, measure: Measure, rows: Mapping[RowKey, Mapping[str, Any]]) -> Floats | None:
        """(1, groups), None where it is not known."""
        if isinstance(measure.untouched, float):
            return -measure.sign * measure.untouched * self.weights(measure)[None]
        found = -measure.sign * self._sums([rows], measure.untouched) if rows else np.full((1, 1), np.inf)
        return found if np.isfinite(found).all() else None


def kept_by(run: FinalRun, metric: Metric | None) -> float | None:
    """What says which of an entry's adapters is kept: the mean of what decides, lower is better; None if it
    diverged."""
    measure = measures_of(next(iter(run.rows.values())), metric)[0]
    if measure.per_token or measured(run.metrics) is None:
        return measured(run.metrics)
    return fmean(-measure.sign * row[measure.field] for row in run.rows.values())


def by_size(entries: Mapping[str, Timing]) -> list[str]:
    """The entries' names by parameters, of those within 2 % the cheaper one first."""
    left, order = by_cost(entries), list[str]()
    while left:
        least = min(entries[name].parameters for name in left)
        order.append(next(name for name in left if entries[name].parameters <= (1 + EQUAL) * least))
        left.remove(order[-1])
    return order


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
