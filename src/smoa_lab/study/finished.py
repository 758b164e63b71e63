"""The finished runs in a study's folder: their held-out rows, and which rates they chose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from smoa.errors import ConfigError, DataError
from smoa_lab.basics.files import read_stored, read_stored_lines
from smoa_lab.basics.values import flat, portable
from smoa_lab.data.answers import ANSWERED, OWN, RULES, MetricName, own_metric
from smoa_lab.study.search import STARTS, Chosen, next_indices, rate
from smoa_lab.study.study import Job, Study
from smoa_lab.training.run_folder import RunFolder

Metrics = dict[str, Any]
"""What ``metrics.json`` has of a run."""


@dataclass(frozen=True)
class Metric:
    """What is compared: a field of each held-out row, ``before`` training as the base model has it and ``after``, per
    token or per row; ``sign`` is 1 where higher is better. It is shown ``scale`` times as large, in ``unit`` with so
    many digits."""

    title: str
    before: str
    after: str
    per_token: bool
    sign: int
    scale: float
    digits: int
    unit: str


LOSS = Metric("loss", "before", "after", True, -1, 1, 4, "nats per token")
OF_CHOICES = Metric("accuracy %", "right_before", "right_after", False, 1, 100, 1, "points")
SCORED = ("scored_before", "scored_after")
BY_NAME = {
    name: Metric(f"{title} %", *SCORED, False, 1, 100, 1, "points")
    for name, title in {"choice": "accuracy", **{name: name for name in RULES}}.items()
} | {OWN: Metric(OWN, *SCORED, False, 1, 1, 3, "points of score")}


def metrics_of(row: Mapping[str, Any], name: MetricName | None) -> Sequence[Metric]:
    """What is compared on rows like this one, where a config names this metric; first what decides."""
    if name is not None:
        return BY_NAME[name], LOSS
    return (LOSS, OF_CHOICES) if OF_CHOICES.after in row else (LOSS,)


def scores_of(metrics: Metrics) -> dict[str, Any]:
    """Those of a run on held-out rows after its training; of the base model as it is."""
    scores: dict[str, Any] = metrics["evaluation"].get("after") or metrics["evaluation"]["before"]
    return scores


def loss_of(metrics: Metrics) -> float | None:
    """What a search goes by; None for a run that diverged."""
    loss: float | None = scores_of(metrics)["loss"]
    return loss


Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run, whose answers ``metric`` scores: it may be another one than when they were written."""

    folder: RunFolder
    metrics: Metrics
    metric: MetricName | None

    @property
    def loss(self) -> float | None:
        return loss_of(self.metrics)

    @cached_property
    def rows(self) -> dict[tuple[str, int], Row]:
        """The held-out rows by digest and number among equal ones, with what the metric makes of their answers, the
        worst where it diverged. Answers are stored, and scores are not; a row that was stored without its answer has
        the score that was stored with it."""
        rows = read_stored_lines(self.folder.rows)
        answer = "right" if self.metric == "choice" else "answer"
        for row in rows if self.metric else ():
            for stage in (stage for stage in ("before", "after") if f"{answer}_{stage}" in row):
                row[f"scored_{stage}"] = -math.inf if row[stage] is None else self._score(row, stage)
        return {(row["digest"], row["copy"]): row for row in rows}

    def _score(self, row: Row, stage: str) -> float:
        if self.metric == "choice":
            return float(row[f"right_{stage}"])
        if self.metric == OWN:
            return own_metric().score(row[f"answer_{stage}"], row["own"], row["where"])
        return float(RULES[str(self.metric)](row[f"answer_{stage}"], row["reference"]))

    @property
    def lost(self) -> float:
        """The mean of what decides, lower is better: by it one of an entry's adapters is kept."""
        rows = [*self.rows.values()]
        metric = metrics_of(rows[0], self.metric)[0]
        if self.loss is None or metric.per_token:
            return math.inf if self.loss is None else self.loss
        return fmean(-metric.sign * row[metric.after] for row in rows)


Finished = Mapping[str, Run]
"""The finished runs by the names of their jobs."""


def read_finished(study: Study) -> Finished:
    """All finished runs in the study's folder. Raises DataError where two of them started from other rows or bases."""
    files = [*study.folder.glob("untouched*/metrics.json"), *study.folder.glob("*/lr-*/metrics.json")]
    metric = study.any_config.data.metric
    found = {
        file.parent.relative_to(study.folder).as_posix(): _read(file, file.stat().st_mtime_ns, metric)
        for file in sorted(files)
    }
    check_inputs(found)
    return found


@cache
def _read(file: Path, changed: int, metric: MetricName | None) -> Run:
    """A run as its file is since it was ``changed``. Where it has no answers, its own metric holds."""
    metrics = read_stored(file)
    own = metrics["config"]["data"].get("metric")
    return Run(RunFolder(file.parent), metrics, metric if own in ANSWERED and metric in ANSWERED else own)


def check_inputs(finished: Finished, now: Mapping[str, str] | None = None) -> None:
    """Raise DataError where two runs, or one and a run that would start ``now``, have other rows or another base."""
    first = now
    for name, run in finished.items():
        digests = run.metrics["digests"]
        first = first or digests
        if other := [key for key in digests if first.get(key, digests[key]) != digests[key]]:
            found = f"another {' and another '.join(other)} than {'is there now' if now else 'other runs'}"
            raise DataError(f"{run.folder.path}: started from {found}; put back what was there, or move {name} away")


def done(study: Study, finished: Finished, job: Job) -> Run | None:
    """The job's run, if it is finished. A run counts if its config is the job's; raises ConfigError for another one in
    the job's folder. The base model is the same whatever adapter is trained."""
    if (run := finished.get(job.name)) is None:
        return None
    wanted = portable(study.config(job).model_dump(mode="json"))
    blocks = ("model", "data", "scoring") if job.is_untouched else tuple(wanted)
    pair = [flat({block: config.get(block) for block in blocks}) for config in (wanted, run.metrics["config"])]
    differ = {key for key in pair[0].keys() | pair[1].keys() if pair[0].get(key) != pair[1].get(key)}
    differ -= {"training.output_dir"} | ({"data.metric"} if run.metric == wanted["data"]["metric"] else set())
    if differ:
        found = f"has a run with another {', another '.join(sorted(differ))}"
        raise ConfigError(f"{run.folder.path}: {found}; move it away, put the values back, or use a new folder")
    return run


def search(study: Study, finished: Finished, name: str) -> tuple[dict[int, float | None], list[Job]]:
    """The losses of an entry's search by index, and the jobs that it needs next: none when it is over. After its first
    runs it waits for the loss of the base model, lest what comes first decides where it goes."""
    start, losses = study.entries[name].learning_rate, dict[int, float | None]()
    of_base = study.untouched("untouched-validation")
    base = done(study, finished, of_base)
    while len(losses) < STARTS or base is not None:
        needed = next_indices(losses, study.tuning.max_runs, base.loss if base else None)
        jobs = {index: Job("search", name, rate(start, index), study.tuning.seed) for index in needed}
        runs = {index: done(study, finished, job) for index, job in jobs.items()}
        losses |= {index: run.loss for index, run in runs.items() if run}
        missing = [jobs[index] for index, run in runs.items() if not run]
        if missing or not needed:
            return losses, missing
    return losses, [of_base]


def chosen(study: Study, finished: Finished, name: str) -> Chosen | None:
    """The rate of an entry's final runs, once its search is over."""
    start = study.entries[name].learning_rate
    if not study.tuning.max_runs:
        return Chosen(start, {}, "named")
    losses, missing = search(study, finished, name)
    return None if missing else Chosen.of(start, losses)


def finals(study: Study, finished: Finished, name: str) -> dict[int, Run]:
    """An entry's finished final runs by seed, in the order of the study's seeds."""
    if (own := chosen(study, finished, name)) is None:
        return {}
    jobs = {seed: Job("final", name, own.learning_rate, seed) for seed in study.seeds}
    return {seed: run for seed, job in jobs.items() if (run := done(study, finished, job))}


def searched(study: Study, finished: Finished, name: str) -> list[Run]:
    """All runs of an entry's search, whatever rate it started from."""
    end = f"-seed-{study.tuning.seed}"
    return [run for job, run in finished.items() if job.startswith(f"{name}/") and job.endswith(end)]
