"""Runs a study: the same search of a rate for each entry, then fresh seeds on the test part; a job is a run folder."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from operator import itemgetter
from typing import Any

from filelock import FileLock

from smoa.atomic import write_whole
from smoa.errors import ConfigError
from smoa_lab.basics.plain import json_text, portable
from smoa_lab.basics.trust import TRUSTED
from smoa_lab.config.run import RunConfig
from smoa_lab.data.answers import OWN
from smoa_lab.data.own_metric import own_metric
from smoa_lab.pages.tables import counted
from smoa_lab.study.plan import MARGIN, TIMED, TIMED_SECONDS, Metrics, Plan, changed_plan, duration, other_inputs
from smoa_lab.study.search import STARTS, Chosen, best_of, index_of, next_indices, rate
from smoa_lab.study.study import Job, Stage, Study
from smoa_lab.training.guards import Diverged
from smoa_lab.training.run import run, score_untouched, time_steps
from smoa_lab.training.run_folder import RunFolder, Taken

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0
"""How long a process that finds no free job waits before it looks again."""


def perform(job: Job, config: RunConfig, timed: float = TIMED_SECONDS) -> Metrics | None:
    """Run a job in this process; a step that is ``timed`` is no longer followed by others. Its metrics get
    ``wall_seconds``; None where another process runs it."""
    folder, started = RunFolder(config.folder), time.perf_counter()
    if job.stage == "timing":
        return time_steps(config, TIMED, timed)
    try:
        metrics = score_untouched(config) if job.is_untouched else run(config)
    except Diverged as error:
        logger.warning("%s: %s", job.name, error)
        with folder.alone():
            metrics = error.finish()
    except Taken:
        return None
    except ConfigError:
        if not folder.finished:  # else another process finished it a moment ago
            raise
        metrics = read_metrics(folder)
    return {**metrics, "wall_seconds": time.perf_counter() - started}


def read_metrics(folder: RunFolder) -> Metrics:
    """The metrics of a finished run."""
    metrics: Metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    return metrics


def measured(metrics: Metrics) -> float | None:
    """What a search goes by: the loss, for preferences DPO's; None for a run that diverged."""
    scores = metrics["evaluation"].get("after") or metrics["evaluation"]["before"]
    loss: float | None = scores.get("dpo_loss", scores["loss"])
    return loss


class Executor(AbstractContextManager["Executor"]):
    """Runs one job at a time, when its result is asked for."""

    workers = 1

    def __init__(self) -> None:
        self.running: dict[Job, Any] = {}
        """The jobs that were started and are not given back yet."""

    def __exit__(self, *error: object) -> None:
        """End what still runs."""

    def start(self, job: Job, *arguments: Any) -> None:
        """Begin what :func:`perform` does with the job and the other arguments."""
        self.running[job] = arguments

    def next_finished(self) -> tuple[Job, Metrics | None]:
        """Wait for one of the running jobs; raises what that job raised."""
        job, arguments = self.running.popitem()
        return job, perform(job, *arguments)

    def result(self, job: Job, *arguments: Any) -> Metrics:
        """Of a job that nothing runs beside."""
        self.start(job, *arguments)
        _, metrics = self.next_finished()
        assert metrics is not None
        return metrics


def read_chosen(study: Study) -> dict[str, Chosen]:
    """The rates that were chosen, by entry, but those at the edge of a search that may go on."""
    file = study.folder / "chosen.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        name: Chosen(one["learning_rate"], {float(tried): loss for tried, loss in one["losses"].items()}, one["place"])
        for name, one in values.items()
        if name in study.entries and not (one["place"] == "edge" and len(one["losses"]) < study.tuning.max_runs)
    }


class Comparison:
    """Runs what is missing of a planned study; every finished run counts, and a killed one is run again or resumed.

    Results choose jobs, and the order in which they come does not: many workers run the very jobs that one runs.
    """

    def __init__(self, study: Study, plan: Plan) -> None:
        self.study, self.plan = study, plan
        self.chosen = read_chosen(study)
        self.losses: dict[Job, float | None] = {}
        """What the finished jobs reached; None for those that diverged."""
        self.configs = {name: study.config(name) for name in study.entries}
        self.metric = next(iter(self.configs.values())).data.metric
        self.scorer = (
            own_metric().name if self.metric == OWN and TRUSTED.metric is not None else plan.digests.get("metric")
        )
        """What stored answers were scored by, or now are."""
        self.took: dict[tuple[Stage, str], float] = {}
        """Seconds of the latest job of each kind that this process ran."""
        self.workers = 1
        self._counted = time.monotonic()

    def run(
        self,
        only: Sequence[str] = (),
        executor: Executor | None = None,
        show: Callable[[Comparison], object] = lambda _: None,
    ) -> None:
        """Search the rates of all entries, or of those that ``only`` names or whose budget it names, then run these
        with fresh seeds, and with more as long as the plan's time allows.

        ``executor`` runs jobs, by default in this process; after each of them, ``show`` may tell of it. Other processes
        may run the same study meanwhile.
        """
        names, taken, told, is_new = self.study.chosen(only), set[Job](), set[Job](), False
        executor = executor or Executor()
        self.workers = executor.workers
        self.catch_up(names)
        if any(not job.is_untouched for job in self.losses):
            logger.info("%s", self.progress(names) or "All runs are done")
        estimate = self.plan.used + self.at_most_left(names)
        if self.study.tuning.max_runs == 0:
            self._choose({n: Chosen(self.study.entries[n].learning_rate, {}, "named") for n in names})
        while jobs := self.ready(names) or self.further(names):
            if is_new:  # a seed that was bought is known by now
                show(self)
                is_new = False
            waiting = [job for job in jobs if job not in executor.running and job not in taken]
            if waiting and (metrics := self.stored(waiting[0])) is not None:
                self.finish(waiting[0], metrics)
            elif waiting and len(executor.running) < executor.workers and not self.is_over:
                executor.start(waiting[0], self.config(waiting[0]))
            elif executor.running:
                job, metrics = executor.next_finished()
                if metrics is None:
                    taken.add(job)
                    if job not in told:
                        logger.info("%s: another process runs it", job.name)
                        told.add(job)
                    continue
                taken.clear()
                is_new = True
                self.finish(job, self._checked(job, metrics))
                self.took[job.stage, job.entry] = metrics["wall_seconds"]
                self._change(lambda plan: {})
                loss, took = self.losses[job], duration(metrics["wall_seconds"])
                left = min(self.at_most_left(names), max(0.0, (self.plan.limit or float("inf")) - self.plan.used))
                reached = "diverged" if loss is None else f"loss {loss:.4f}"
                logger.info("%s: %s (%s); at most %s left", job.name, reached, took, duration(left))
                now = self.plan.used + left
                if abs(now - estimate) > estimate / 10 and duration(now) != duration(estimate):
                    logger.info("At most %s in all, not %s", duration(now), duration(estimate))
                    estimate = now
            elif self.is_over:
                logger.info("The %g minutes are used, and nothing more starts", self.plan.minutes)
                break
            else:  # other processes run all that is left
                time.sleep(POLL_SECONDS)
                taken.clear()

    def catch_up(self, names: Sequence[str]) -> None:
        """Note what has run."""
        for name, one in self.chosen.items():  # the searches must still be those of this study
            for tried in one.losses:
                self.stored(Job("search", name, tried, self.study.tuning.seed))
        for name in names:
            while done := [(job, found) for job in self.ready([name]) if (found := self.stored(job)) is not None]:
                for job, metrics in done:
                    self.finish(job, metrics)

    def ready(self, names: Sequence[str]) -> list[Job]:
        """What can be run now: the untouched model and searches, one rate of all entries at a time; once all rates are
        chosen, final runs, one seed of all at a time."""
        untouched = [self.untouched("untouched")] if self.plan.seeds else []
        if all(name in self.chosen for name in names):
            jobs = [self.final(name, seed) for seed in self.plan.seeds for name in names]
        else:
            wanted = {name: enumerate(self.search(name), start=len(self._searched(name))) for name in names}
            turns = sorted((turn for of_entry in wanted.values() for turn in of_entry), key=itemgetter(0))
            jobs = [self.untouched("untouched-validation"), *(job for _, job in turns)]
        return [job for job in [*untouched, *jobs] if job not in self.losses]

    def further(self, names: Sequence[str]) -> list[Job]:
        """The next seed of all entries, if there is time for it by what runs took, whatever came out at them."""
        entries, known = list(self.study.entries), self.plan.seeds
        if self.plan.limit is None or self.ready(entries):
            return []
        seconds = MARGIN * sum(self.seconds("final", name) for name in entries) / self.workers

        def bought(plan: Plan) -> dict[str, Any]:
            new = [seed for seed in plan.listed if seed not in plan.seeds][:1]
            has_time = plan.limit is not None and plan.used + seconds <= plan.limit
            return {"seeds": [*plan.seeds, *new]} if new and has_time and plan.seeds == known else {}

        self._change(bought)
        return self.ready(names)

    def look(self, budget: str, names: Sequence[str]) -> int:
        """How many looks there were before this one at the final runs of a budget's entries, at any rates."""
        runs = sum(len([*self.study.folder.glob(f"{name}/lr-*-seed-{seed}")]) for name in names for seed in self.seeds)

        def seen(plan: Plan) -> dict[str, Any]:
            known = plan.looks.get(budget, [])
            return {} if runs in known else {"looks": {**plan.looks, budget: [*known, runs]}}

        self._change(seen)
        return self.plan.looks[budget].index(runs)

    def _change(self, change: Callable[[Plan], dict[str, Any]]) -> None:
        """Change the plan in its file, where other processes may have changed it, and add the time that was used."""
        now = time.monotonic()
        used, self._counted = now - self._counted, now
        self.plan = changed_plan(self.study, lambda plan: {"used": plan.used + used, **change(plan)})

    @property
    def is_over(self) -> bool:
        """Whether the plan's time is used."""
        limit = self.plan.limit
        return limit is not None and self.plan.used + time.monotonic() - self._counted >= limit

    @property
    def seeds(self) -> list[int]:
        """Those of the plan; once its time is used, those that all entries have run."""
        begun = {job.entry for job in self.losses if job.stage == "final"}
        return [
            seed
            for seed in self.plan.seeds
            if not self.is_over or (begun and all(self.final(name, seed) in self.losses for name in begun))
        ]

    def final(self, name: str, seed: int) -> Job:
        return Job("final", name, self.chosen[name].learning_rate, seed)

    def untouched(self, stage: Stage) -> Job:
        """The model as it is, in the first entry's config."""
        first = next(iter(self.plan.entries))
        return Job(stage, first, self.study.entries[first].learning_rate, 0)

    def seconds(self, stage: Stage, entry: str) -> float:
        """About how long a job takes: as its latest one did, else what was planned, by the pace of those that ran."""
        planned = sum(self.plan.seconds(*kind) for kind in self.took)
        pace = sum(self.took.values()) / planned if planned else 1.0
        return self.took.get((stage, entry), pace * self.plan.seconds(stage, entry))

    def at_most_left(self, names: Sequence[str]) -> float:
        """Seconds of the jobs that are not finished, each search at its longest."""
        seconds = 0.0
        for name in names:
            searches = 0 if name in self.chosen else self.study.tuning.max_runs - len(self._searched(name))
            finals = sum(job.stage == "final" and job.entry == name for job in self.losses)
            seconds += searches * self.seconds("search", name)
            seconds += (len(self.plan.seeds) - finals) * self.seconds("final", name)
        return seconds / self.workers

    def progress(self, names: Sequence[str]) -> str:
        """What is done, and how long the rest takes at most; empty where nothing is left."""
        if not self.ready(names):
            return ""
        searches = counted(sum(len(one.losses) for one in self.searches().values()), "run")
        finals = counted(sum(job.stage == "final" for job in self.losses), "final run")
        left = duration(self.at_most_left(names))
        return f"{searches} of searches and {finals} are done; the rest takes {left} at most."

    def searches(self) -> dict[str, Chosen]:
        """The searches that there are, those that are not over too."""
        found = {}
        for name, entry in self.study.entries.items():
            if name in self.chosen:
                found[name] = self.chosen[name]
            elif losses := self._searched(name):
                found[name] = replace(Chosen.of(entry.learning_rate, losses), place="open")
        return {name: one for name, one in found.items() if one.losses}

    def search(self, name: str) -> list[Job]:
        """The runs that an entry's search needs next; none when it is over, or goes on by what the untouched model
        reaches."""
        losses, untouched = self._searched(name), self.untouched("untouched-validation")
        if name in self.chosen or (len(losses) >= STARTS and untouched not in self.losses):
            return []
        start, tuning = self.study.entries[name].learning_rate, self.study.tuning
        indices = next_indices(losses, tuning.max_runs, self.losses.get(untouched))
        return [Job("search", name, rate(start, index), tuning.seed) for index in indices]

    def _searched(self, name: str) -> dict[int, float | None]:
        """The losses of an entry's search by index, as far as they are known."""
        start = self.study.entries[name].learning_rate
        own = {job: loss for job, loss in self.losses.items() if (job.stage, job.entry) == ("search", name)}
        return {index_of(start, job.learning_rate): loss for job, loss in own.items()}

    def config(self, job: Job) -> RunConfig:
        return self.study.job_config(self.configs[job.entry], job, None if job.is_untouched else self.plan.steps)

    def stored(self, job: Job) -> Metrics | None:
        folder = RunFolder(self.study.folder / job.name)
        return self._checked(job, read_metrics(folder)) if folder.finished else None

    def _checked(self, job: Job, metrics: Metrics) -> Metrics:
        """The metrics of a job, if it is the one that was planned; else raises ConfigError."""
        known = RunConfig.model_validate(metrics["config"])  # an absent key is its default
        old, new = (portable(config.model_dump(mode="json")) for config in (known, self.config(job)))
        other = {"output_dir": None} | ({"max_steps": None} if job.is_untouched else {})
        for values in (old, new):
            values["training"] |= other
            values["data"]["metric"] = None  # any one scores the same answers
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        changed += other_inputs(self.plan.digests, metrics["digests"])
        if changed:
            found = f"was run with other values of {', '.join(sorted(changed))}"
            raise ConfigError(f"{self.study.folder / job.name}: {found}; move it away, or use a new folder")
        return metrics

    def finish(self, job: Job, metrics: Metrics) -> None:
        """Note a finished job; choose the rates of searches that are over; drop the adapters that are not to be
        kept."""
        self.losses[job] = measured(metrics)
        if job.stage in ("search", "untouched-validation") and self.untouched("untouched-validation") in self.losses:
            over = [name for name in self.searches() if name not in self.chosen and not self.search(name)]
            starts = {name: self.study.entries[name].learning_rate for name in over}
            self._choose({name: Chosen.of(start, self._searched(name)) for name, start in starts.items()})
        if not job.is_untouched:
            self._drop_adapters(job)

    def _choose(self, chosen: dict[str, Chosen]) -> None:
        """Write the rates that were chosen, beside those that other processes chose."""
        if not chosen:
            return
        with FileLock(self.study.folder / ".lock"):
            self.chosen = {**chosen, **read_chosen(self.study)}
            values = {name: asdict(one) for name, one in self.chosen.items()}
            write_whole(self.study.folder / "chosen.json", json_text(values) + "\n")

    def _drop_adapters(self, job: Job) -> None:
        """Of final runs the study says what is kept. A search keeps none, but where no final runs follow."""
        keep = "none" if job.stage == "search" and self.study.seeds else self.study.keep
        if keep == "all":
            return
        kind = job.stage, job.entry
        alike = {other: loss for other, loss in self.losses.items() if (other.stage, other.entry) == kind}
        for other in alike:
            if keep == "none" or other != best_of(alike):
                shutil.rmtree(RunFolder(self.study.folder / other.name).adapter, ignore_errors=True)
