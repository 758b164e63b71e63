"""Runs a study: the same search of a rate for each entry, then fresh seeds on the test part; a job is a run folder."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

from filelock import FileLock

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.pages.tables import counted
from smoa_lab.study.decision import Budget
from smoa_lab.study.executor import Executor
from smoa_lab.study.metrics import loss_of, read_metrics
from smoa_lab.study.plan import (
    LEAST_SEEDS,
    MARGIN,
    Metrics,
    Plan,
    Take,
    changed_plan,
    duration,
    error_text,
    other_config,
    other_inputs,
    read_chosen,
    write_chosen,
)
from smoa_lab.study.results import FinalRun, Found, kept_by, read_rows
from smoa_lab.study.search import STARTS, Chosen, best_of, index_of, next_indices, rate
from smoa_lab.study.study import Job, Stage, Study
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0
"""How long a process that finds no free job waits before it looks again."""


def _try_again(plan: Plan) -> dict[str, Any]:
    """What failed is tried again, but for entries whose steps could not be timed."""
    failed = {name: told for name, told in plan.failed.items() if name not in plan.entries}
    return {"failed": failed} if failed != plan.failed else {}


def _taken(family: str, take: Take, plan: Plan) -> dict[str, Any]:
    return {"takes": {**plan.takes, family: take}}


class Comparison:
    """Runs what is missing of a planned study; every finished run counts, and a killed one is run again or resumed.

    Final runs come in rounds, a seed of all entries each. After a round it is asked whether a budget has its answer:
    its entries run no further. Results choose jobs, and the order in which they come does not.
    """

    def __init__(self, study: Study, plan: Plan) -> None:
        self.study, self.plan = study, plan
        self.chosen = read_chosen(study)
        self.losses: dict[Job, float | None] = {}
        """What the finished jobs reached; None for those that diverged."""
        self.configs = {name: study.config(name) for name in study.entries}
        self.metric = next(iter(self.configs.values())).data.metric
        self.took: dict[tuple[Stage, str], float] = {}
        """Seconds of the latest job of each kind that this process ran."""
        self.workers = 1
        self._rows: dict[Job, FinalRun] = {}
        self._estimate = 0.0
        self._counted = time.time()

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
        names, executor = self.study.chosen(only), executor or Executor()
        self._resume(names, executor.workers)
        taken, told = set[Job](), set[Job]()  # which other processes run, and of which that was said
        self._decide(only)
        while (jobs := self.ready(names) or self.further(names)) or executor.running:
            waiting = [job for job in jobs if job not in executor.running and job not in taken]
            if waiting and (metrics := self.stored(waiting[0])) is not None:
                self.finish(waiting[0], metrics)
                self._drop_adapters(waiting[0])
                self._decide(only)
            elif waiting and waiting[0].stage == "search" and self.must_choose(waiting[0]):
                logger.info("Searches end here: what is left of the time is for two seeds")
                while open_ := self._to_search(names):
                    self._choose({open_[0]: self._cut(open_[0])})
            elif waiting and len(executor.running) < executor.workers and not self.is_over:
                executor.start(waiting[0], self.config(waiting[0]))
            elif executor.running:
                job, found = executor.next_finished()
                if found is None:
                    if job not in told:
                        logger.info("%s: another process runs it", job.name)
                    taken.add(job)
                    told.add(job)
                    continue
                taken.clear()
                if isinstance(found, Exception):
                    self._fail(job, found)
                else:
                    self.finish(job, self._checked(job, found))
                    self._drop_adapters(job)
                    self._log(job, found["wall_seconds"], names)
                    self._decide(only)
                if self.ready(names) or self.further(names):  # by now with a seed that was bought
                    show(self)
            elif self.is_over:
                logger.info("The %g minutes are used, and nothing more starts", self.plan.minutes)
                break
            else:  # other processes run all that is left
                time.sleep(POLL_SECONDS)
                taken.clear()

    def _resume(self, names: Sequence[str], workers: int) -> None:
        """Note what has run, and try again what failed."""
        self.workers = workers
        self._change(_try_again)
        self.catch_up(names)
        for job in self.losses:
            self._drop_adapters(job)
        self._fix_starts()
        if any(not job.is_untouched for job in self.losses):
            logger.info("%s", self.progress(names) or "All runs are done")
        self._estimate = self.plan.used + self.at_most_left(names)
        if self.study.tuning.max_runs == 0:
            self._choose({n: Chosen(self.study.entries[n].learning_rate, {}, "named") for n in names})

    def _log(self, job: Job, seconds: float, names: Sequence[str]) -> None:
        """Say what a finished job reached, and how long the rest takes; of the whole where that changed by a tenth."""
        self.took[job.stage, job.entry] = seconds
        self._change(lambda plan: {})
        loss, limit = self.losses[job], math.inf if self.plan.limit is None else self.plan.limit
        left = min(self.at_most_left(names), max(0.0, limit - self.plan.used))
        reached = "diverged" if loss is None else f"loss {loss:.4f}"
        logger.info("%s: %s (%s); at most %s left", job.name, reached, duration(seconds), duration(left))
        now, before = self.plan.used + left, self._estimate
        if abs(now - before) > before / 10 and duration(now) != duration(before):
            logger.info("At most %s in all, not %s", duration(now), duration(before))
            self._estimate = now

    def _fail(self, job: Job, error: Exception) -> None:
        """Note an entry that failed; raises the error where no entry could do without the job."""
        if job.is_untouched:
            raise error
        told = error_text(error)
        logger.error("%s: %s", job.name, told)
        self._change(lambda plan: {"failed": {**plan.failed, job.entry: told}})
        self._fix_starts()
        if self.plan.failed.keys() >= self.study.entries.keys():
            raise error

    def _decide(self, only: Sequence[str] = ()) -> None:
        """Ask, round by round, for the answer of each family that has none, and write it into the plan; nothing where
        ``only`` some of the entries run."""
        if only or len(self.plan.seeds) < 2 or not any(job.stage == "final" for job in self.losses):
            return
        for name in self.study.families().keys() - self.plan.takes.keys():
            for number in self.plan.looked_at():
                budget = self.budgets(number).get(name)
                if budget is None or budget.round < number:
                    break
                if (take := budget.decision()) is not None:
                    found = Take(entry=take.entry, round=number, level=budget.level, tolerance=self.study.tolerance)
                    self._change(partial(_taken, name, found))
                    break

    def budgets(self, most: int | None = None) -> dict[str, Budget]:
        """The results of each budget, up to so many rounds, by default to that of its answer or the last whole one."""
        return self.found().budgets(most)

    def found(self) -> Found:
        """What final runs found."""
        run = RunFolder(self.study.folder / "untouched")
        untouched = read_rows(run, self.metric) if run.finished else {}
        return Found(self.study, self.plan, self.chosen, self.finals(), self.metric, untouched)

    def finals(self) -> dict[str, dict[int, FinalRun]]:
        """The finished final runs by entry and seed."""
        found: dict[str, dict[int, FinalRun]] = {}
        for name in (each for each in self.study.entries if each in self.chosen and each in self.plan.entries):
            for seed in self.plan.seeds:
                job = self.final(name, seed)
                if job not in self._rows and (metrics := self.stored(job)) is not None:
                    folder = RunFolder(self.study.folder / job.name)
                    self._rows[job] = FinalRun(folder, metrics, read_rows(folder, self.metric))
                if job in self._rows:
                    found.setdefault(name, {})[seed] = self._rows[job]
        return found

    def must_choose(self, job: Job) -> bool:
        """Whether a search's job would take the time of two seeds of all entries."""
        if self.plan.limit is None or not self.plan.seeds:
            return False
        rounds = LEAST_SEEDS * sum(self.seconds("final", name) for name in self._timed()) / self.workers
        now = self.plan.used + time.time() - self._counted
        return now + self.seconds("search", job.entry) + MARGIN * rounds > self.plan.limit

    def _timed(self) -> list[str]:
        return [name for name in self.study.entries if name in self.plan.entries]

    def _cut(self, name: str) -> Chosen:
        """What an entry takes whose search ends before its time."""
        start, losses = self.plan.start(self.study, name), self._searched(name)
        found = Chosen.of(start, losses) if losses else Chosen(start, {}, "cut")
        return replace(found, place="cut") if found.place == "edge" else found

    def catch_up(self, names: Sequence[str]) -> None:
        """Note what has run."""
        for name, one in self.chosen.items():  # whose searches must still be those of this study
            for tried in one.losses:
                self.stored(Job("search", name, tried, self.study.tuning.seed))
        for name in names:
            while done := [(job, found) for job in self.ready([name]) if (found := self.stored(job)) is not None]:
                for job, metrics in done:
                    self.finish(job, metrics)

    def ready(self, names: Sequence[str]) -> list[Job]:
        """What can be run now: the untouched model and searches, one rate of all entries at a time; once all rates are
        chosen, final runs, one seed of all at a time, of the families without an answer."""
        untouched = [self.untouched("untouched")] if self.plan.seeds else []
        if not (searched := self._to_search(names)):
            open_ = [name for name in names if name in self.unanswered()]
            jobs = [self.final(name, seed) for seed in self.plan.seeds for name in open_]
        else:
            wanted = {name: enumerate(self.search(name), start=len(self._searched(name))) for name in searched}
            turns = sorted((turn for of_entry in wanted.values() for turn in of_entry), key=itemgetter(0))
            jobs = [self.untouched("untouched-validation"), *(job for _, job in turns)]
        return [job for job in [*untouched, *jobs] if job not in self.losses]

    def unanswered(self) -> list[str]:
        """The entries of families without an answer, but those that failed."""
        wanted = {name for own in self._open_families() for name in own} - self.plan.failed.keys()
        return [name for name in self.study.entries if name in wanted]

    def _open_families(self) -> list[list[str]]:
        return [own for family, own in self.study.families().items() if family not in self.plan.takes]

    def _to_search(self, names: Sequence[str]) -> list[str]:
        """Those of the entries whose rates are not chosen, each behind the one from whose rate its search starts."""
        found: dict[str, None] = {}
        for name in (each for each in names if each not in self.chosen and each not in self.plan.failed):
            if name not in self.plan.starts:
                found |= dict.fromkeys(self._to_search(self._size_before(name)))
            found[name] = None
        return list(found)

    def _size_before(self, name: str) -> list[str]:
        return [other for other in self.study.at_other_sizes(name) if other not in self.plan.failed][:1]

    def _fix_starts(self) -> None:
        """Write where the search of each entry with a size starts, once, as soon as the size before has chosen."""
        found = {}
        for name in (name for name, entry in self.study.entries.items() if entry.size and name not in self.plan.starts):
            before = self._size_before(name)
            if all(other in self.chosen for other in before):
                rates = [self.chosen[other].learning_rate for other in before]
                found[name] = (rates or [self.study.entries[name].learning_rate])[0]
        if found:
            self._change(lambda plan: {"starts": {**found, **plan.starts}})

    def further(self, names: Sequence[str]) -> list[Job]:
        """The next seed of all entries without an answer, if there is time for it by what runs took, whatever came out
        at them."""
        known, entries = self.plan.seeds, self.unanswered()
        at_edge = {name for name, one in self.chosen.items() if one.is_at_edge}
        if all(len(at_edge & {*own}) > 1 for own in self._open_families()):
            return []  # nobody is taken over two, whatever runs
        if self.plan.limit is None or self.ready([*self.study.entries]) or not entries:
            return []
        seconds = MARGIN * sum(self.seconds("final", name) for name in entries) / self.workers

        def bought(plan: Plan) -> dict[str, Any]:
            new = [seed for seed in plan.listed if seed not in plan.seeds][:1]
            has_time = plan.limit is not None and plan.used + seconds <= plan.limit
            return {"seeds": [*plan.seeds, *new]} if new and has_time and plan.seeds == known else {}

        self._change(bought)
        return self.ready(names)

    def _change(self, change: Callable[[Plan], dict[str, Any]]) -> None:
        """Change the plan in its file, where other processes may have changed it, and add the time that was used."""
        since, self._counted = self._counted, time.time()

        def changed(plan: Plan) -> dict[str, Any]:  # seconds that another process counted are not counted again
            used = plan.used + max(0.0, self._counted - max(since, plan.counted))
            return {"used": used, "counted": max(self._counted, plan.counted), **change(plan)}

        self.plan = changed_plan(self.study, changed)

    @property
    def is_over(self) -> bool:
        """Whether the plan's time is used."""
        limit = self.plan.limit
        return limit is not None and self.plan.used + time.time() - self._counted >= limit

    def final(self, name: str, seed: int) -> Job:
        return Job("final", name, self.chosen[name].learning_rate, seed)

    def untouched(self, stage: Stage) -> Job:
        """The model as it is, in any entry's config."""
        first = next(iter(self.study.entries))
        return Job(stage, first, self.study.entries[first].learning_rate, 0)

    def seconds(self, stage: Stage, entry: str) -> float:
        """About how long a job takes: as its latest one did, else what was planned, by the pace of those that ran."""
        planned = sum(self.plan.seconds(*kind) for kind in self.took)
        pace = sum(self.took.values()) / planned if planned else 1.0
        return self.took.get((stage, entry), pace * self.plan.seconds(stage, entry))

    def at_most_left(self, names: Sequence[str]) -> float:
        """Seconds of the jobs that are not finished, each search at its longest."""
        seconds = 0.0
        for name in (each for each in self._to_search(names) if each in self.plan.entries):
            seconds += (self.study.tuning.max_runs - len(self._searched(name))) * self.seconds("search", name)
        for name in (each for each in self.unanswered() if each in names and each in self.plan.entries):
            finals = sum(job.stage == "final" and job.entry == name for job in self.losses)
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
        for name in self.study.entries:
            if name in self.chosen:
                found[name] = self.chosen[name]
            elif losses := self._searched(name):
                found[name] = replace(Chosen.of(self.plan.start(self.study, name), losses), place="open")
        return {name: one for name, one in found.items() if one.losses}

    def search(self, name: str) -> list[Job]:
        """The runs that an entry's search needs next; none when it is over, or goes on by what the untouched model
        reaches."""
        losses, untouched = self._searched(name), self.untouched("untouched-validation")
        if name in self.chosen or (len(losses) >= STARTS and untouched not in self.losses):
            return []
        if self.study.entries[name].size and name not in self.plan.starts:
            return []
        start, tuning = self.plan.start(self.study, name), self.study.tuning
        indices = next_indices(losses, tuning.max_runs, self.losses.get(untouched))
        return [Job("search", name, rate(start, index), tuning.seed) for index in indices]

    def _searched(self, name: str) -> dict[int, float | None]:
        """The losses of an entry's search by index, as far as they are known."""
        start = self.plan.start(self.study, name)
        own = {job: loss for job, loss in self.losses.items() if (job.stage, job.entry) == ("search", name)}
        return {index_of(start, job.learning_rate): loss for job, loss in own.items()}

    def config(self, job: Job) -> RunConfig:
        return self.study.job_config(self.configs[job.entry], job, None if job.is_untouched else self.plan.steps)

    def stored(self, job: Job) -> Metrics | None:
        folder = RunFolder(self.study.folder / job.name)
        return self._checked(job, read_metrics(folder)) if folder.finished else None

    def _checked(self, job: Job, metrics: Metrics) -> Metrics:
        """The metrics of a job, if it is the one that was planned; else raises ConfigError."""
        config = self.config(job)
        changed = other_config(metrics["config"], config, job.is_untouched)
        changed += other_inputs(self.plan.digests, metrics["digests"])
        if changed:
            found = f"was run with other values of {', '.join(sorted(changed))}"
            raise ConfigError(f"{self.study.folder / job.name}: {found}; move it away, or use a new folder")
        return metrics

    def finish(self, job: Job, metrics: Metrics) -> None:
        """Note a finished job, and choose the rates of searches that are over."""
        self.losses[job] = loss_of(metrics)
        if job.stage in ("search", "untouched-validation") and self.untouched("untouched-validation") in self.losses:
            over = [name for name in self.searches() if name not in self.chosen and not self.search(name)]
            self._choose({name: Chosen.of(self.plan.start(self.study, name), self._searched(name)) for name in over})

    def _choose(self, chosen: dict[str, Chosen]) -> None:
        """Write the rates that were chosen, beside those that other processes chose."""
        if not chosen:
            return
        with FileLock(self.study.folder / ".lock"):
            self.chosen = {**chosen, **read_chosen(self.study)}
            write_chosen(self.study, self.chosen)
        self._fix_starts()

    def _drop_adapters(self, job: Job) -> None:
        """Of runs like this one keep the adapters that the study says; of a search none, but where no final runs
        follow."""
        keep = "none" if job.stage == "search" and self.study.seeds else self.study.keep
        if keep == "all" or job.is_untouched:
            return
        alike = {each: loss for each, loss in self.losses.items() if (each.stage, each.entry) == (job.stage, job.entry)}
        if job.stage == "final" and self.metric is not None and keep == "best":
            known = self.finals()[job.entry]
            alike = {self.final(job.entry, seed): kept_by(run, self.metric) for seed, run in known.items()}
        for other in alike:
            if keep == "none" or other != best_of(alike):
                shutil.rmtree(RunFolder(self.study.folder / other.name).adapter, ignore_errors=True)
