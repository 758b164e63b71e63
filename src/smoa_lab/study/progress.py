"""What is known of a planned study, and what it needs next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from filelock import FileLock

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.pages.tables import counted
from smoa_lab.study.decision import Budget
from smoa_lab.study.metrics import loss_of, read_metrics
from smoa_lab.study.plan import (
    Metrics,
    Plan,
    changed_plan,
    duration,
    other_config,
    other_inputs,
    read_chosen,
    stored_chosen,
    write_chosen,
)
from smoa_lab.study.results import FinalRun, Found, read_rows
from smoa_lab.study.search import STARTS, Chosen, index_of, next_indices, rate
from smoa_lab.study.study import Job, Stage, Study
from smoa_lab.training.run_folder import RunFolder


class Progress:
    """What is known of a planned study by its folder, and what it needs next. Final runs come in rounds, a seed of all
    entries each; those of a family that has its answer run no further. Results choose jobs, and the order in which they
    come does not."""

    def __init__(self, study: Study, plan: Plan) -> None:
        self.study, self.plan = study, plan
        self.chosen = read_chosen(study)
        self.losses: dict[Job, float | None] = {}
        """What the finished jobs reached; None for those that diverged."""
        self.configs = {name: study.config(name) for name in study.entries}
        self.metric = next(iter(self.configs.values())).data.metric
        self.took: dict[tuple[Stage, str], float] = {}
        """Seconds of the latest job of each kind: about as many as its file says, exactly if this process ran it."""
        self.workers = 1
        self._rows: dict[Job, FinalRun] = {}
        self._counted, self._clock = time.time(), time.monotonic()

    def budgets(self, most: int | None = None) -> dict[str, Budget]:
        """The results of each budget, up to so many rounds, by default to that of its answer or the last whole one."""
        return self.found().budgets(most)

    def found(self) -> Found:
        """What final runs found."""
        run = RunFolder(self.study.folder / "untouched")
        untouched = read_rows(run, self.metric) if run.finished else {}
        return Found(self.study, self.plan, self.chosen, self.finals(), self.metric, untouched)

    def finals(self) -> dict[str, dict[int, FinalRun]]:
        """The finished final runs by entry and seed, but those whose answers the user's metric failed to score: their
        entries failed."""
        found: dict[str, dict[int, FinalRun]] = {}
        for name in (each for each in self.study.entries if each in self.chosen and each in self.plan.entries):
            for seed in self.plan.seeds:
                job = self.final(name, seed)
                if job not in self._rows and (metrics := self.stored(job)) is not None:
                    folder = RunFolder(self.study.folder / job.name)
                    self._rows[job] = FinalRun(folder, metrics, read_rows(folder, self.metric))
                if job in self._rows and self._rows[job].is_scored:
                    found.setdefault(name, {})[seed] = self._rows[job]
        return found

    def unscored(self) -> set[str]:
        """The entries that have a final run without all of its scores."""
        self.finals()
        return {job.entry for job, run in self._rows.items() if not run.is_scored}

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
        """What can be run now: the base model and searches, one rate of all entries at a time; once all rates are
        chosen, final runs, one seed of all at a time, of the families without an answer."""
        untouched = [self.study.untouched("untouched")] if self.plan.seeds else []
        if not (searched := self._to_search(names)):
            open_ = [name for name in names if name in self.unanswered()]
            jobs = [self.final(name, seed) for seed in self.plan.seeds for name in open_]
        else:
            wanted = {name: enumerate(self.search(name), start=len(self._searched(name))) for name in searched}
            turns = sorted((turn for of_entry in wanted.values() for turn in of_entry), key=itemgetter(0))
            jobs = [self.study.untouched("untouched-validation"), *(job for _, job in turns)]
        return [job for job in [*untouched, *jobs] if job not in self.losses]

    def unanswered(self) -> list[str]:
        """The entries of families without an answer, but those that failed."""
        wanted = {name for own in self._open_families() for name in own} - self.plan.failed.keys()
        return [name for name in self.study.entries if name in wanted]

    def _open_families(self) -> list[list[str]]:
        return [own for family, own in self.study.families().items() if not self._is_answered(family, own)]

    def _is_answered(self, family: str, own: Sequence[str]) -> bool:
        """Whether it was decided by today's entries with today's rates, but for those that failed."""
        take = self.plan.takes.get(family)
        rates = {name: self.chosen[name].learning_rate if name in self.chosen else None for name in own}
        if take is None or not take.entries:
            return take is not None
        return all(name in self.plan.failed or take.entries.get(name) == rate for name, rate in rates.items())

    def outdated(self, plan: Plan) -> list[str]:
        """The families that were decided without an entry that by now has as many rounds, at the rate that it has."""
        found, finals = [], self.finals()
        for family, take in plan.takes.items():
            seeds = {*plan.seeds[: take.round]}
            whole = [name for name in self.study.families().get(family, []) if seeds <= finals.get(name, {}).keys()]
            alive = [name for name in whole if name not in plan.failed]
            if take.entries and any(take.entries.get(n) != self.chosen[n].learning_rate for n in alive):
                found.append(family)
        return found

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

    def _change(self, change: Callable[[Plan], dict[str, Any]]) -> None:
        """Change the plan in its file, where other processes may have changed it, and add the time that was used."""
        since, self._counted = self._counted, time.time()
        began, self._clock = self._clock, time.monotonic()

        def changed(plan: Plan) -> dict[str, Any]:
            of_others = max(0.0, plan.counted - since)  # counted by another process, and not again
            used = plan.used + max(0.0, self._clock - began - of_others)
            return {"used": used, "counted": self._counted, **change(plan)}

        self.plan = changed_plan(self.study, changed)

    @property
    def is_over(self) -> bool:
        """Whether the plan's time is used."""
        limit = self.plan.limit
        return limit is not None and self.plan.used + time.monotonic() - self._clock >= limit

    def final(self, name: str, seed: int) -> Job:
        return Job("final", name, self.chosen[name].learning_rate, seed)

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
        """The runs that an entry's search needs next; none when it is over, or goes on by what the base model
        reaches."""
        losses, untouched = self._searched(name), self.study.untouched("untouched-validation")
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
        changed += other_inputs(self.study, self.plan.digests, metrics["digests"])
        if changed:
            found = f"was run with other values of {', '.join(sorted(changed))}"
            raise ConfigError(f"{self.study.folder / job.name}: {found}; move it away, or use a new folder")
        return metrics

    def finish(self, job: Job, metrics: Metrics) -> None:
        """Note a finished job, and choose the rates of searches that are over."""
        self.losses[job] = loss_of(metrics)
        if not job.is_untouched and self.losses[job] is not None and not metrics["training"].get("resumed"):
            beside = self.plan.seconds(job.stage, job.entry) - self.plan.steps * self.plan.entries[job.entry].step
            self.took[job.stage, job.entry] = metrics["training"]["seconds"] + beside
        if (
            job.stage in ("search", "untouched-validation")
            and self.study.untouched("untouched-validation") in self.losses
        ):
            over = [name for name in self.searches() if name not in self.chosen and not self.search(name)]
            self._choose({name: Chosen.of(self.plan.start(self.study, name), self._searched(name)) for name in over})

    def _choose(self, chosen: dict[str, Chosen]) -> None:
        """Write the rates that were chosen, beside those that other processes chose."""
        if not chosen:
            return
        with FileLock(self.study.folder / ".lock"):
            self.chosen = {**chosen, **read_chosen(self.study)}
            write_chosen(self.study, {**stored_chosen(self.study), **self.chosen})
        self._fix_starts()
