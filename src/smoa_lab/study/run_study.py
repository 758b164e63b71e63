"""Runs a study: the same search of a rate for each entry, then fresh seeds on the test part; a job is a run folder."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from smoa_lab.pages.tables import score_text
from smoa_lab.study.executor import Executor
from smoa_lab.study.metrics import scores_of
from smoa_lab.study.plan import (
    LEAST_SEEDS,
    MARGIN,
    Metrics,
    Plan,
    Take,
    duration,
    error_text,
)
from smoa_lab.study.progress import Progress
from smoa_lab.study.results import kept_by
from smoa_lab.study.search import Chosen, best_of
from smoa_lab.study.study import Job, Stage
from smoa_lab.training.run_folder import OfAnother, RunFolder

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0
"""How long a process that finds no free job waits before it looks again."""


def _with(takes: Mapping[str, Take], plan: Plan) -> dict[str, Any]:
    return {"takes": {**plan.takes, **takes}}


def _try_again(others: Collection[str], plan: Plan) -> dict[str, Any]:
    """What failed is tried again, but for these entries, and those whose steps could not be timed."""
    failed = {name: told for name, told in plan.failed.items() if name in others or name not in plan.entries}
    return {"failed": failed} if failed != plan.failed else {}


class Comparison(Progress):
    """Runs what is missing of a planned study; every finished run counts, and a killed one is run again or resumed.
    After a round it is asked whether a family has its answer."""

    _estimate = 0.0

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
                self._drop_adapters(waiting[0].stage, waiting[0].entry)
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
                    self._drop_adapters(job.stage, job.entry)
                    self._log(job, found, names)
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
        self._change(partial(_try_again, (self.study.entries.keys() - {*names}) | self.unscored()))
        self.catch_up(names)
        for stage, entry in {(job.stage, job.entry) for job in self.losses}:
            self._drop_adapters(stage, entry)
        self._fix_starts()
        if any(not job.is_untouched for job in self.losses):
            logger.info("%s", self.progress(names) or "All runs are done")
        self._estimate = self.plan.used + self.at_most_left(names)
        if self.study.tuning.max_runs == 0:
            self._choose({n: Chosen(self.study.entries[n].learning_rate, {}, "named") for n in names})

    def _log(self, job: Job, metrics: Metrics, names: Sequence[str]) -> None:
        """Say what a finished job reached, and how long the rest takes; of the whole where that changed by a tenth."""
        self.took[job.stage, job.entry] = seconds = metrics["wall_seconds"]
        self._change(lambda plan: {})
        loss, limit = self.losses[job], math.inf if self.plan.limit is None else self.plan.limit
        left = min(self.at_most_left(names), max(0.0, limit - self.plan.used))
        reached = "diverged" if loss is None else f"loss {loss:.4f}"
        name = "accuracy" if self.metric == "choice" else str(self.metric)
        if loss is not None and name in (scores := scores_of(metrics)):
            reached = f"{score_text(name, scores[name])}, {reached}"
        logger.info("%s: %s (%s); at most %s left", job.name, reached, duration(seconds), duration(left))
        now, before = self.plan.used + left, self._estimate
        if abs(now - before) > before / 10 and duration(now) != duration(before):
            logger.info("At most %s in all, not %s", duration(now), duration(before))
            self._estimate = now

    def _fail(self, job: Job, error: Exception) -> None:
        """Note an entry that failed; raises the error where no entry could do without the job, or it is no fault of the
        entry's."""
        if job.is_untouched or isinstance(error, OfAnother):
            raise error
        told = error_text(error)
        logger.error("%s: %s", job.name, told)
        self._change(lambda plan: {"failed": {**plan.failed, job.entry: told}})
        self._fix_starts()
        if self.plan.failed.keys() >= self.study.entries.keys():
            raise error

    def _decide(self, only: Sequence[str] = ()) -> None:
        """Ask, round by round, for the answer of each family that has none, and write it into the plan; nothing where
        ``only`` some of the entries run. One whose entries or rates are others than those that decided gets one more
        look."""
        if only or len(self.plan.seeds) < 2 or not any(job.stage == "final" for job in self.losses):
            return
        if self.outdated(self.plan):  # which another process may have noted by now
            self._change(
                lambda plan: plan.one_more_look(names, len(plan.seeds)) if (names := self.outdated(plan)) else {}
            )
        for number in self.plan.looked_at():
            known = self.plan.takes
            whole = {n: one for n, one in self.budgets(number).items() if n not in known and one.round >= number}
            takes = {name: take for name, budget in whole.items() if (take := budget.take()) is not None}
            if takes:
                self._change(partial(_with, takes))

    def must_choose(self, job: Job) -> bool:
        """Whether a search's job would take the time of two seeds of all entries."""
        if self.plan.limit is None or not self.plan.seeds:
            return False
        timed = [name for name in self.study.entries if name in self.plan.entries]
        rounds = LEAST_SEEDS * sum(self.seconds("final", name) for name in timed) / self.workers
        now = self.plan.used + time.monotonic() - self._clock
        return now + self.seconds("search", job.entry) + MARGIN * rounds > self.plan.limit

    def _cut(self, name: str) -> Chosen:
        """What an entry takes whose search ends before its time."""
        start, losses = self.plan.start(self.study, name), self._searched(name)
        found = Chosen.of(start, losses) if losses else Chosen(start, {}, "cut")
        return replace(found, place="cut") if found.place == "edge" else found

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

    def _drop_adapters(self, stage: Stage, entry: str) -> None:
        """Of an entry's runs of this stage keep the adapters that the study says; of a search none, but where no final
        runs follow."""
        keep = "none" if stage == "search" and self.study.seeds else self.study.keep
        if keep == "all" or stage not in ("search", "final"):
            return
        alike = {job: loss for job, loss in self.losses.items() if (job.stage, job.entry) == (stage, entry)}
        if stage == "final" and keep == "best":
            known = self.finals().get(entry, {})
            alike = {self.final(entry, seed): kept_by(run, self.metric) for seed, run in known.items()}
        for other in alike:
            if keep == "none" or other != best_of(alike):
                shutil.rmtree(RunFolder(self.study.folder / other.name).adapter, ignore_errors=True)
