"""The results of a study's entries, from the folders of its runs, which are read and never changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smoa_lab.basics.folders import read_stored_lines
from smoa_lab.data.answers import RULES, MetricName
from smoa_lab.study.bounds import Family, Floats, level_of
from smoa_lab.study.decision import Budget, Result, by_cost, by_size
from smoa_lab.study.metrics import RUN_AGAIN, SCORED, Metric, loss_of, metrics_of
from smoa_lab.study.plan import Metrics, Plan, Take
from smoa_lab.study.search import Chosen, best_of
from smoa_lab.study.study import ALL_SIZES, Study
from smoa_lab.training.run_folder import RunFolder

RowKey = tuple[str, int]
"""A row's digest, and its number among equal ones."""


@dataclass(frozen=True)
class FinalRun:
    """A finished run and its held-out rows."""

    folder: RunFolder
    metrics: Metrics
    rows: dict[RowKey, dict[str, Any]]

    @property
    def is_scored(self) -> bool:
        """Whether no answer lacks the score that the metric gives it."""
        return all(row.get(SCORED, 0.0) is not None for row in self.rows.values())


def stored_rows(run: RunFolder) -> list[dict[str, Any]]:
    """What is stored of each held-out row."""
    return read_stored_lines(run.rows, {"digest", "copy", "tokens"}, RUN_AGAIN)


def read_rows(run: RunFolder, name: MetricName | None = None) -> dict[RowKey, dict[str, Any]]:
    """The held-out rows of a run, with what the metric of this name makes of stored answers, the worst where it
    diverged."""
    rows, answer = stored_rows(run), "right_{}" if name == "choice" else "answer_{}"
    for row in rows if name is not None else ():
        for stage in (stage for stage in ("before", "after") if answer.format(stage) in row):
            value = row.get(f"right_{stage}" if name == "choice" else f"scored_{stage}")
            if name in RULES:
                value = float(RULES[name](row[f"answer_{stage}"], row["reference"]))
            row[f"scored_{stage}"] = -math.inf if row[stage] is None else value
    return {(row["digest"], row["copy"]): row for row in rows}


@dataclass(frozen=True)
class Found:
    """What a study has found: ``finals`` by entry and seed, and the ``untouched`` model's rows."""

    study: Study
    plan: Plan
    chosen: Mapping[str, Chosen]
    finals: Mapping[str, Mapping[int, FinalRun]]
    metric: MetricName | None
    untouched: Mapping[RowKey, Mapping[str, Any]]

    def budgets(self, most: int | None = None) -> dict[str, Budget]:
        """Each family that has a final run, after at most so many rounds: by default those of its answer, or all that
        are whole."""
        families = self.study.families()
        return {name: self._budget(name, most) for name, own in families.items() if self.finals.keys() & {*own}}

    def _budget(self, name: str, most: int | None) -> Budget:
        listed = self.study.families()[name]
        take = None if most else self.take(name)
        decided_by = (take and take.entries) or [entry for entry in listed if entry not in self.plan.failed]
        alive = [entry for entry in listed if entry in decided_by]
        number = self._round(alive, take.round if take else most)
        finals = self._of_rounds(listed if number < 2 else alive, number)
        held_out = HeldOut.of([run for own in finals.values() for run in own.values()], self.metric)
        dropped = self._dropped(name)
        level = take.level if take else self.plan.level(len(listed) + dropped)
        sizes = [self.study.entries[entry].size or 0 for entry in finals]
        values = {
            each: {entry: held_out.values(each, [*own.values()]) for entry, own in finals.items()}
            for each in held_out.metrics
        }
        width = min(map(len, finals.values()))  # as many seeds as each entry has
        families = {
            each.title: Family(
                names=[*finals],
                values=np.array([own[:width] for own in values[each].values()]),
                untouched=held_out.untouched(each, self.untouched),
                weights=held_out.weights(each),
                is_share=held_out.is_share(each, finals),
                level=level,
                entries=len(listed) + dropped,
                pools=sizes,
            )
            for each in held_out.metrics
        }
        timings, looked = {entry: self.plan.entries[entry] for entry in finals}, self.plan.looked_at()
        made = Budget(
            results=[],
            families=families,
            metric=held_out.metrics[0] if held_out.metrics else None,
            order=by_size(timings) if name == ALL_SIZES else by_cost(timings),
            at_edge=[entry for entry in finals if self.chosen[entry].is_at_edge],
            round=number,
            planned=self.plan.rounds,
            done=sum(len(self.finals.get(entry, ())) for entry in alive),
            wanted=len(self.plan.seeds) * len(alive),
            level=level,
            tolerance=self.study.tolerance,
            is_last=take is not None or (bool(looked) and number >= looked[-1]),
            of_sizes=name == ALL_SIZES,
            was_planned=take is not None and take.level == level_of(len(listed) + dropped, self.plan.rounds),
        )
        shown = self.plan.entries[made.against].parameters
        results = []
        for entry, own in finals.items():
            alone = {  # with the seeds that others don't have yet
                each: replace(families[each.title], names=[entry], values=of_entry[entry][None])
                for each, of_entry in values.items()
            }
            found = {each.title: (0.0 - each.sign * one.mean(entry), one.spread(entry)) for each, one in alone.items()}
            results.append(self._result(entry, own, made, shown, found))
        if (metric := made.metric) is not None:
            results.sort(key=lambda one: -metric.sign * one.values[metric.title][0])
        return replace(made, results=results)

    def take(self, name: str) -> Take | None:
        """What a family's look decided, as long as the entries that decided it have their rates."""
        take = self.plan.takes.get(name)
        return take if take and take.stands({name: one.learning_rate for name, one in self.chosen.items()}) else None

    def _round(self, alive: Sequence[str], most: int | None) -> int:
        """How many whole rounds of a family are shown; between two looks those of the last one."""
        if not alive:
            return 0
        whole = [all(seed in self.finals.get(entry, {}) for entry in alive) for seed in self.plan.seeds]
        rounds = whole.index(False) if False in whole else len(whole)
        if most:
            return min(rounds, most)
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
        sized = self.plan.dropped_sizes if name == ALL_SIZES else {}
        dropped = {n: budget for n, budget in self.plan.dropped.items() if n not in self.study.entries}
        return sum(entry in sized or budget in listed for entry, budget in dropped.items())

    def _result(
        self,
        name: str,
        runs: Mapping[int, FinalRun],
        budget: Budget,
        shown: int,
        values: dict[str, tuple[float, float]],
    ) -> Result:
        all_runs = self.finals[name]  # one of a later round than is shown may be the one that was kept
        kept = {seed: kept_by(run, self.metric) for seed, run in all_runs.items() if run.folder.adapter.is_dir()}
        forgot: list[Any] = [(run.metrics["forgetting"] or {}).get("change") for run in runs.values()]
        first = next(iter(runs.values()))
        memories = [run.metrics["training"].get("peak_memory") for run in runs.values()]  # older ones: the process's
        families, timing = budget.families, self.plan.entries[name]
        sizes = (run.metrics["parameters"].get("adapter_bytes") for run in runs.values())
        return Result(
            entry=name,
            method=self.study.entries[name].method,
            budget=self.study.entries[name].budget,
            parameters=timing.parameters,
            share=timing.parameters / max(1, shown),
            chosen=self.chosen[name],
            seeds=list(runs),
            diverged=sum(loss_of(run.metrics) is None for run in runs.values()),
            rows=len(first.rows),
            groups=len(next(iter(families.values())).weights) if families else len(first.rows),
            values=values,
            worst={
                title: family.worst(name)
                for title, family in families.items()
                if budget.round > 1 and len(budget.order) > 1
            },
            step_seconds=timing.step,
            memory=max((each for each in memories if each), default=None),
            size=next(filter(None, sizes), None),  # a run that diverged saved nothing
            forgotten=None if None in forgot else fmean(forgot),
            kept=str(all_runs[best_of(kept)].folder.path) if kept else None,
        )


@dataclass(frozen=True)
class HeldOut:
    """The held-out ``rows`` of runs, which all have the same: their ``keys``, group by group, and where each group
    ``starts``; and what is compared on them."""

    rows: Mapping[RowKey, Mapping[str, Any]]
    keys: Sequence[RowKey]
    starts: NDArray[np.intp]
    metrics: Sequence[Metric]

    @classmethod
    def of(cls, runs: Sequence[FinalRun], metric: MetricName | None) -> HeldOut:
        """A metric that is the same everywhere compares nothing; what the metric makes stays."""
        rows = runs[0].rows
        keys = sorted(rows, key=lambda key: rows[key].get("group") or key[0])
        of_group = np.array([rows[key].get("group") or key[0] for key in keys])
        starts = np.flatnonzero(np.concatenate([[True], of_group[1:] != of_group[:-1]]))
        metrics = [
            each
            for each in metrics_of(rows[keys[0]], metric, runs[0].metrics["config"]["training"])
            if each.field == SCORED
            or {None} <= (found := {run.rows[key][each.field] for run in runs for key in keys})
            or len(found) > 1
        ]
        return cls(rows, keys, starts, metrics)

    def _sums(self, runs: Sequence[Mapping[RowKey, Mapping[str, Any]]], field: str) -> Floats:
        """(runs, groups), infinite where a run diverged."""
        of_runs = [[rows[key][field] for key in self.keys] for rows in runs]
        values = np.array([[np.inf if value is None else value for value in own] for own in of_runs], np.float64)
        return np.asarray(np.add.reduceat(values, self.starts, axis=1))

    def weights(self, metric: Metric) -> Floats:
        if metric.per_token:
            return np.asarray(self._sums([self.rows], "tokens")[0])
        return np.diff([*self.starts, len(self.keys)]).astype(float)

    def values(self, metric: Metric, runs: Sequence[FinalRun]) -> Floats:
        """(runs, groups), lower is better, infinite where a run diverged."""
        values = -metric.sign * self._sums([run.rows for run in runs], metric.field)
        diverged = np.array([loss_of(run.metrics) is None for run in runs])
        return np.where(np.isfinite(values) & ~diverged[:, None], values, np.inf)

    def is_share(self, metric: Metric, finals: Mapping[str, Mapping[int, FinalRun]]) -> bool:
        """Whether the metric counts right answers, as a user's own does if it gives 0 and 1 alone."""
        if metric.is_share or metric.field != SCORED:
            return metric.is_share
        runs = (run for own in finals.values() for run in own.values())
        return {run.rows[key][SCORED] for run in runs for key in self.keys} <= {0, 1, -math.inf}  # -inf: diverged

    def untouched(self, metric: Metric, rows: Mapping[RowKey, Mapping[str, Any]]) -> Floats | None:
        """(1, groups), None where it is not known."""
        if isinstance(metric.untouched, float):
            return -metric.sign * metric.untouched * self.weights(metric)[None]
        found = -metric.sign * self._sums([rows], metric.untouched) if rows else np.full((1, 1), np.inf)
        return found if np.isfinite(found).all() else None


def kept_by(run: FinalRun, name: MetricName | None) -> float | None:
    """What says which of an entry's adapters is kept: the mean of what decides, lower is better; None if it
    diverged."""
    metric = metrics_of(next(iter(run.rows.values())), name, run.metrics["config"]["training"])[0]
    if metric.per_token or loss_of(run.metrics) is None:
        return loss_of(run.metrics)
    return fmean(-metric.sign * row[metric.field] for row in run.rows.values())
